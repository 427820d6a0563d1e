"""Computes the memory that a model takes on a rank: its weights in each mode, and the KV cache of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.families import FAMILIES, Family, Role

GIB = 1 << 30
MIB = 1 << 20

VOCAB_PADDING = 64
"""SGLang pads the rows of a vocabulary to a multiple of this."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model. The sizes of its weights follow from them.

    Attributes:
        family: Its family.
        layer: One of its layers.
        layers: Number of its layers.
        vocabulary: Number of tokens in its vocabulary.
        tied_embeddings: Whether the LM head is the embedding.
        bias_roles: The roles of the linears that have a bias.
    """

    family: Family
    layer: Layer
    layers: int
    vocabulary: int
    tied_embeddings: bool
    bias_roles: frozenset[Role]

    @classmethod
    def of(cls, hf_config: Any) -> ModelSizes:
        """Return the sizes from a Hugging Face configuration, whose architecture is in :data:`FAMILIES`."""
        family = FAMILIES[hf_config.architectures[0]]
        hidden, heads = hf_config.hidden_size, hf_config.num_attention_heads
        layer = Layer(
            hidden=hidden,
            intermediate=hf_config.intermediate_size,
            heads=heads,
            kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(hf_config, "head_dim", None) or hidden // heads,
        )
        bias_roles = frozenset(linear.role for linear in family.linears if linear.has_bias(hf_config))
        tied_embeddings = hf_config.tie_word_embeddings
        return cls(family, layer, hf_config.num_hidden_layers, hf_config.vocab_size, tied_embeddings, bias_roles)

    def weight_bytes(self, ranks: int, sp_size: int, element_bytes: int) -> int:
        """Return the bytes of the base weights on one rank; each storage counts once. The TP weights are views of them.

        Args:
            ranks: P, which must suit the layer.
            sp_size: S. With S = 1, these are the weights of stock TP.
            element_bytes: Bytes of one weight.

        Raises:
            ShiftError: the layer cannot be divided by ``ranks``.
        """
        shards = self.layer.shards(ranks)
        roles = [linear.role for linear in self.family.linears]
        linears = sum(self._base_elements(role, shards[role], sp_size) for role in roles)
        norms = 2 * self.layer.hidden + (2 * self.layer.head_dim if self.family.qk_norm else 0)
        elements = self.layers * (linears + norms) + self.layer.hidden + self.embedding_elements(ranks)
        return elements * element_bytes

    def embedding_elements(self, ranks: int) -> int:
        """Return the number of weights of the embedding and the LM head on one rank. Both modes have the same."""
        rows = padded_vocab(self.vocabulary, ranks) // ranks
        return rows * self.layer.hidden * (1 if self.tied_embeddings else 2)

    def kv_bytes_per_token(self, ranks: int, element_bytes: int) -> int:
        """Return the bytes of K and V of one token on one rank, in all layers. They depend on neither mode nor S."""
        return 2 * self.layers * self.layer.attention.of_rank(ranks).kv * self.layer.head_dim * element_bytes

    def _base_elements(self, role: Role, shard: tuple[int, int], sp_size: int) -> int:
        """Return the elements of a base weight and its bias.

        A base weight has S shards. If the ranks sum products, the bias is whole on each rank.
        """
        outputs, inputs = shard
        bias = outputs if role in self.bias_roles else 0
        return sp_size * outputs * inputs + (bias if role.row_parallel else sp_size * bias)


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
