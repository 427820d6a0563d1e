"""The matrices of any decoder: dense layers, mixtures of experts, and latent attention (MLA).

Parameters, memory and step times follow from this description. :mod:`sglang_shift.models.decoder_config` reads it from
a ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_layer import Layer


class Division(Enum):
    """How the ranks divide a weight. P ranks serve the model, and S of them share the tokens in SP."""

    BASE = "a rank has 1/P for TP, and S/P for SP"
    KV = "as BASE, by KV heads; each rank has at least one KV head for TP, and S KV heads for SP"
    SHARD = "a rank has 1/P for both modes"
    EXPERTS = "a rank has 1/P for both modes, or S/P for SP if experts are replicated"
    VOCABULARY = "a rank has 1/P of the padded rows"
    WHOLE = "a rank has everything"


class Place(Enum):
    """The part of a layer that a matrix belongs to. The value has names of its modules in checkpoints."""

    ATTENTION = ("self_attn.q_proj", "self_attn.qkv_proj", "self_attn.kv_b_proj")
    MLP = ("mlp.gate_proj", "mlp.gate_up_proj", "mlp.up_proj")
    EXPERTS = ("mlp.experts", "mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1")
    SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_expert.gate_proj")
    ROUTER = ()
    NORMS = ("input_layernorm",)


@dataclass(frozen=True)
class Matrix:
    """Equal matrices of a model, or vectors with one output.

    Attributes:
        place: The part of the layer.
        division: How the ranks divide each of them.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        count: Number of them in the model.
        bias: Whether each has a bias.
        row_parallel: Whether ranks divide the inputs. Then the bias is whole on each rank.
    """

    place: Place
    division: Division
    outputs: int
    inputs: int
    count: int
    bias: bool = False
    row_parallel: bool = False

    @property
    def elements(self) -> int:
        """Number of weights of all of them, without their biases."""
        return self.outputs * self.inputs * self.count


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        count: Number of experts, E.
        per_token: Number of experts that compute each token, k.
        intermediate: Width of an expert.
        layers: Number of layers that have experts.
        shared: Width of what computes every token beside the experts, or 0.
    """

    count: int
    per_token: int
    intermediate: int
    layers: int
    shared: int = 0

    def distinct(self, tokens: int) -> float:
        """Return the expected number of experts that compute at least one of the tokens: ``E (1 - (1 - k/E)^tokens)``.

        Each token is assumed to choose its k experts at random, and without regard to other tokens. The formula is that
        of https://arxiv.org/abs/2505.19645 (MoESD). Real routers prefer some experts, so they need fewer.
        """
        return self.count * (1 - (1 - self.per_token / self.count) ** tokens)


@dataclass(frozen=True)
class Latent:
    """Latent attention (MLA). Every rank has the latents of all tokens, in both modes.

    Attributes:
        query_rank: Width of a query's latent, or None if queries have no latent.
        rank: Width of the latent of keys and values.
        rope: Width of the part of a key that all heads share, and of a query's part for it.
        nope: Width of the other part of a head's key.
        value: Width of a head's value.
    """

    query_rank: int | None
    rank: int
    rope: int
    nope: int
    value: int

    @property
    def cached(self) -> int:
        """Width of a token in the KV cache of a layer."""
        return self.rank + self.rope

    @property
    def head(self) -> int:
        """Width of a head's query, and of its key."""
        return self.nope + self.rope

    @property
    def down(self) -> int:
        """Outputs of the projection from the hidden states to the latents."""
        return (self.query_rank or 0) + self.cached


@dataclass(frozen=True)
class Traits:
    """What a class of models has, and no field of its ``config.json`` says.

    Attributes:
        gated: Whether the MLP has a gate beside the up projection.
        qk_norm: Whether queries and keys are normalized.
        qkv_bias: Whether the QKV projection has a bias, or the field that decides this.
        output_bias: The same, of the output projection.
        norms: Number of norms of a layer, without those of queries and keys.
        shared_experts: Number of shared experts, if no field says it.
        whole_embedding: Whether each rank has the whole embedding.
    """

    gated: bool = True
    qk_norm: bool = False
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    norms: int = 2
    shared_experts: int = 0
    whole_embedding: bool = False


@dataclass(frozen=True)
class Decoder:
    """A decoder.

    Attributes:
        layer: Its attention, and the MLP of its dense layers.
        layers: Number of its layers.
        vocabulary: Number of tokens in its vocabulary.
        tied_embeddings: Whether the LM head is the embedding.
        experts: The experts of its sparse layers, or None.
        latent: Its latent attention, or None. Then :attr:`layer` has the width of a head's query as ``head_dim``.
        gated: Whether its MLPs have a gate.
        qk_norm: Whether queries and keys are normalized.
        qkv_bias: Whether QKV projections have a bias.
        output_bias: Whether output projections have a bias.
        norms: Number of norms of a layer.
        whole_embedding: Whether each rank has the whole embedding.
        cached_layers: Number of layers that have a KV cache. None means all.
        windowed_layers: Number of layers that attend to a window of tokens only.
        vision: Number of weights of encoders beside the decoder.
    """

    layer: Layer
    layers: int
    vocabulary: int
    tied_embeddings: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    gated: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    norms: int = 2
    whole_embedding: bool = False
    cached_layers: int | None = None
    windowed_layers: int = 0
    vision: int = 0

    @property
    def dense_layers(self) -> int:
        """Number of layers without experts."""
        return self.layers - (self.experts.layers if self.experts else 0)

    @property
    def parameters(self) -> int:
        """Number of weights of the decoder, without biases and encoders."""
        return self.embeddings + sum(matrix.elements for matrix in self.matrices())

    @property
    def active_parameters(self) -> int:
        """Number of weights that compute a token: of the experts of a layer, only those that compute the token."""
        total = self.embeddings
        for matrix in self.matrices():
            part = matrix.elements
            if self.experts and matrix.place is Place.EXPERTS:
                part = part * self.experts.per_token // self.experts.count
            total += part
        return total

    @property
    def embeddings(self) -> int:
        """Number of weights of the embedding and the LM head, without padding."""
        return self.vocabulary * self.layer.hidden * (1 if self.tied_embeddings else 2)

    def check(self, ranks: int) -> None:
        """Check that P ranks can divide the layers.

        Raises:
            ShiftError: they cannot.
        """
        self.layer.shards(ranks)
        if self.experts and (self.experts.intermediate % ranks or self.experts.shared % ranks):
            raise ShiftError(
                f"{ranks} ranks for experts of {self.experts.intermediate} and shared experts of "
                f"{self.experts.shared}; give a number that divides both"
            )

    def matrices(self) -> Iterator[Matrix]:
        """Yield the matrices of all layers, and the norms."""
        yield from self._attention()
        yield from self._mlp(Place.MLP, Division.BASE, self.layer.intermediate, self.dense_layers)
        if self.experts:
            layers, hidden = self.experts.layers, self.layer.hidden
            yield from self._mlp(
                Place.EXPERTS, Division.EXPERTS, self.experts.intermediate, layers * self.experts.count
            )
            yield from self._mlp(Place.SHARED, Division.BASE, self.experts.shared, layers)
            yield Matrix(Place.ROUTER, Division.WHOLE, self.experts.count, hidden, layers)
        yield from self._norms()

    def _attention(self) -> Iterator[Matrix]:
        layer, latent, layers = self.layer, self.latent, self.layers
        hidden, heads, place = layer.hidden, layer.heads, Place.ATTENTION
        if latent is None:
            queries, values = heads * layer.head_dim, 2 * layer.kv_heads * layer.head_dim
            yield Matrix(place, Division.BASE, queries, hidden, layers, self.qkv_bias)
            yield Matrix(place, Division.KV, values, hidden, layers, self.qkv_bias)
            yield Matrix(place, Division.BASE, hidden, queries, layers, self.output_bias, row_parallel=True)
            return
        yield Matrix(place, Division.WHOLE, latent.down, hidden, layers)
        if latent.query_rank:
            yield Matrix(place, Division.SHARD, heads * latent.head, latent.query_rank, layers)
        else:
            yield Matrix(place, Division.BASE, heads * latent.head, hidden, layers)
        yield Matrix(place, Division.SHARD, heads * (latent.nope + latent.value), latent.rank, layers)
        yield Matrix(place, Division.BASE, hidden, heads * latent.value, layers, self.output_bias, row_parallel=True)

    def _mlp(self, place: Place, division: Division, intermediate: int, count: int) -> Iterator[Matrix]:
        if not intermediate * count:
            return
        hidden = self.layer.hidden
        yield Matrix(place, division, (2 if self.gated else 1) * intermediate, hidden, count)
        yield Matrix(place, division, hidden, intermediate, count, row_parallel=True)

    def _norms(self) -> Iterator[Matrix]:
        widths = [self.layer.hidden] * self.norms + ([self.layer.head_dim] * 2 if self.qk_norm else [])
        if self.latent:
            widths += [self.latent.query_rank or 0, self.latent.rank]
        yield Matrix(Place.NORMS, Division.WHOLE, 1, sum(widths), self.layers)
        yield Matrix(Place.NORMS, Division.WHOLE, 1, self.layer.hidden, 1)
