"""Computes the memory that a model takes on a rank: its weights in each mode, and the KV cache of a token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from sglang_shift.models.decoder import Decoder, Division, Matrix, Place
from sglang_shift.models.decoder_config import MOST_LAYERS, decoder_of, outline_of
from sglang_shift.models.formats import BFLOAT16, Format
from sglang_shift.models.heads import kv_heads_of_rank

GIB = 1 << 30
MIB = 1 << 20

VOCAB_PADDING = 64
"""SGLang pads the rows of a vocabulary to a multiple of this."""

SHARDED, REPLICATED = "sharded", "replicated"
"""What a rank has of the experts for SP: its TP shard, or the shards of its SP group."""


@dataclass(frozen=True)
class Part:
    """All weights that ranks divide in one way.

    Attributes:
        division: How the ranks divide them.
        elements: Number of those in the model's dtype.
        stored: Bytes of those in a dtype of their own.
    """

    division: Division
    elements: int | Fraction = 0
    stored: int | Fraction = 0


@dataclass(frozen=True)
class KvCache:
    """The KV cache of a model.

    Attributes:
        layers: Number of layers that have one. A sliding window is not regarded: its layers count as any other.
        kv_heads: Number of KV heads, which ranks divide or replicate; 0 with latent attention.
        width: Width of a head's key, which is that of its value; or the width of a latent, which every rank has.
    """

    layers: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, decoder: Decoder) -> KvCache:
        """Return the KV cache of a decoder."""
        layers = decoder.layers if decoder.cached_layers is None else decoder.cached_layers
        if decoder.latent:
            return cls(layers, 0, decoder.latent.cached)
        return cls(layers, decoder.layer.kv_heads, decoder.layer.head_dim)

    def bytes_per_token(self, ranks: int, element_bytes: int) -> int:
        """Return the bytes of one token on one rank, in all layers. They depend on neither mode nor S."""
        vectors = 2 * kv_heads_of_rank(self.kv_heads, ranks) if self.kv_heads else 1
        return self.layers * vectors * self.width * element_bytes


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        parts: Its weights.
        decoder: The description of its attention and its embedding.
    """

    parts: tuple[Part, ...]
    decoder: Decoder

    @classmethod
    def of(cls, hf_config: Any, weights: Format = BFLOAT16) -> ModelSizes:
        """Return the sizes that follow from a Hugging Face configuration.

        Args:
            hf_config: The configuration.
            weights: The format of the matrices. ``bfloat16`` stands for the model's dtype.

        Raises:
            KeyError, ValueError: the fields do not say the sizes.
        """
        return cls.of_decoder(decoder_of(hf_config), weights)

    @classmethod
    def of_decoder(cls, decoder: Decoder, weights: Format = BFLOAT16) -> ModelSizes:
        """Return the sizes that follow from the description of a decoder."""
        return cls(total(parts_of(decoder, weights)), decoder)

    @property
    def cache(self) -> KvCache:
        """The KV cache."""
        return KvCache.of(self.decoder)

    def weight_bytes(
        self, ranks: int, sp_size: int, element_bytes: int, experts: str = SHARDED, *, whole_tables: bool = False
    ) -> int:
        """Return the bytes of the base weights on one rank; each storage counts once. The TP weights are views of them.

        Args:
            ranks: P, which must suit the layers.
            sp_size: S. With S = 1, these are the weights of stock TP.
            element_bytes: Bytes of one weight in the model's dtype.
            experts: ``sharded`` or ``replicated``.
            whole_tables: Whether each rank has the whole embedding and LM head, as with instances.
        """

        def share(division: Division) -> Fraction:
            whole = whole_tables and division is Division.VOCABULARY
            return self._share(division, ranks, sp_size, experts) * (ranks if whole else 1)

        return ceil(sum(share(part.division) * (part.elements * element_bytes + part.stored) for part in self.parts))

    def kv_bytes_per_token(self, ranks: int, element_bytes: int) -> int:
        """Return the bytes of the KV cache of one token on one rank. They depend on neither mode nor S."""
        return self.cache.bytes_per_token(ranks, element_bytes)

    def _share(self, division: Division, ranks: int, sp_size: int, experts: str) -> Fraction:
        """Return the part of a weight that is on each rank. It is more than 1 if KV heads are replicated in it."""
        if division is Division.WHOLE:
            return Fraction(1)
        if division is Division.VOCABULARY:
            return Fraction(padded_vocab(self.decoder.vocabulary, ranks), self.decoder.vocabulary * ranks)
        if division is Division.KV:
            kv_heads = self.decoder.layer.kv_heads
            return Fraction(sp_size * kv_heads_of_rank(kv_heads, ranks), kv_heads)
        stacked = division is Division.BASE or (division is Division.EXPERTS and experts == REPLICATED)
        return Fraction(sp_size if stacked else 1, ranks)


def cache_of(hf_config: Any) -> KvCache:
    """Return the KV cache of a model, of which only the attention must be known.

    Raises:
        KeyError, ValueError: the fields of the Hugging Face configuration do not say the sizes.
    """
    return KvCache.of(outline_of(hf_config))


def parts_of(decoder: Decoder, weights: Format) -> Iterable[Part]:
    """Yield the weights of a decoder.

    Norms count as if they had the format of the matrices, because they are too small to matter.
    """
    embedding = decoder.vocabulary * decoder.layer.hidden
    yield Part(Division.WHOLE if decoder.whole_embedding else Division.VOCABULARY, embedding)
    yield Part(Division.VOCABULARY, decoder.embeddings - embedding)
    yield Part(Division.SHARD, decoder.vision)
    for matrix in decoder.matrices():
        exempt = exempt_share(matrix, decoder, weights)
        quantized = matrix.elements * (1 - exempt)
        yield Part(matrix.division, matrix.elements - quantized, quantized * weights.bits / 8)
        if matrix.bias:
            yield Part(Division.WHOLE if matrix.row_parallel else matrix.division, matrix.outputs * matrix.count)
    if latent := decoder.latent:
        # SGLang keeps the projection from the latent a second time, as two matrices for absorbed attention.
        copies = decoder.layers * decoder.layer.heads * (latent.nope + latent.value) * latent.rank
        yield Part(Division.SHARD, copies)


def exempt_share(matrix: Matrix, decoder: Decoder, weights: Format) -> Fraction:
    """Return the share of a matrix's layers in which it has the model's dtype. Routers always have it."""
    if not weights.quantized or matrix.place is Place.ROUTER:
        return Fraction(1)
    return weights.exempt_share(matrix.place.value, min(decoder.layers, MOST_LAYERS))


def total(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Add up the parts that ranks divide in the same way."""
    sums: dict[Division, list[int | Fraction]] = defaultdict(lambda: [0, 0])
    for part in parts:
        sums[part.division][0] += part.elements
        sums[part.division][1] += part.stored
    return tuple(Part(division, *both) for division, both in sums.items())


def padded_vocab(vocab_size: int, ranks: int) -> int:
    """Return the rows of the embedding on all ranks, padded as SGLang's VocabParallelEmbedding does."""
    # This is not imported from SGLang, so the launcher need not load SGLang's layers and their kernels.
    padding = VOCAB_PADDING
    if -(-vocab_size // padding) * padding % ranks:
        padding *= ranks
    return -(-vocab_size // padding) * padding


def size_text(size: int) -> str:
    """Return a number of bytes as text for a person."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
