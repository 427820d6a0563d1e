"""The work of the blocks of a layer, attention and MLP, on a rank in each mode: products, bytes and messages.

T is the number of tokens of a step. A rank has R rows of them: R = T in TP, and R = T/S, rounded up, in SP. The methods
take R and S, with S = 1 for TP. docs/cost-model.md has the formulae.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_shift.models.decoder import Decoder, Experts, Latent, Place
from sglang_shift.models.formats import BFLOAT16, Format
from sglang_shift.models.sizes import MOST_LAYERS, REPLICATED
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.tools.plan.hardware import Gpu

ELEMENT = 2
"""Bytes of an activation."""


@dataclass(frozen=True)
class Product:
    """Matrix products of one kernel.

    Attributes:
        rows: Rows of all of them together.
        outputs: Rows of each weight.
        inputs: Columns of each weight.
        weights: The format of the weights.
        count: Number of weights that are read.
    """

    rows: float
    outputs: int
    inputs: int
    weights: Format = BFLOAT16
    count: float = 1.0


@dataclass(frozen=True)
class Messages:
    """What a block sends in a layer. Sizes are bytes of a rank's buffer.

    Attributes:
        all_to_alls: Over the S ranks of an SP group. An all-gather counts as one.
        all_reduces: Over the P/S ranks of a base-TP group.
    """

    all_to_alls: tuple[float, ...] = ()
    all_reduces: tuple[float, ...] = ()


def format_in(place: Place, decoder: Decoder, weights: Format) -> Format:
    """Return the format of the matrices of a place: that of the model, unless most of them are exempt."""
    share = weights.exempt_share(place.value, min(decoder.layers, MOST_LAYERS))
    return BFLOAT16 if share > 0.5 else weights


class HeadAttention:
    """Attention whose heads have keys and values of their own, or of their group."""

    def __init__(self, decoder: Decoder, layout: RankLayout, weights: Format) -> None:
        heads, head_dim = decoder.layer.attention.of_rank(layout.world_size), decoder.layer.head_dim
        self.hidden, self.qk_norm = decoder.layer.hidden, decoder.qk_norm
        self.weights = format_in(Place.ATTENTION, decoder, weights)
        self.queries, self.values = heads.query * head_dim, heads.kv * head_dim

    def products(self, rows: int, sp: int) -> Iterator[Product]:
        """Yield the products of a layer."""
        yield Product(rows, sp * (self.queries + 2 * self.values), self.hidden, self.weights)
        yield Product(rows, self.hidden, sp * self.queries, self.weights)

    def elementwise(self, tokens: int, rows: int, sp: int) -> Iterator[float]:
        """Yield the bytes of each elementwise kernel of a layer."""
        queries, values = self.queries, self.values
        yield tokens * 2 * (queries + values) * ELEMENT  # the rotary embedding
        yield tokens * 4 * values * ELEMENT  # the copy of K and V into the cache
        if self.qk_norm:
            yield tokens * 2 * (queries + values) * ELEMENT
        if self.weights.quantizes_inputs:
            yield from (rows * (ELEMENT + 1) * size for size in (self.hidden, sp * queries))
        if sp > 1:  # each exchange packs and unpacks its data
            yield from 2 * [rows * 2 * sp * (queries + 2 * values) * ELEMENT]
            yield from 2 * [rows * 2 * sp * queries * ELEMENT]

    def messages(self, rows: int, sp: int) -> Messages:
        """Return what a layer sends."""
        widths = (sp * (self.queries + 2 * self.values), sp * self.queries)
        return Messages(tuple(rows * width * ELEMENT for width in widths), (rows * self.hidden * ELEMENT,))

    def seconds_per_pair(self, phase: str, gpu: Gpu, kv_dtype: str) -> float:
        """Return the seconds of a layer per pair of a query token and a KV-cache token.

        In a prefill this is the time of arithmetic: two products of a head's size for each head of the rank. In a
        decode it is the time to read K and V of the rank's heads.
        """
        if phase == "prefill":
            return 4 * self.queries / gpu.prefill_attention.rate
        return 2 * self.values * _kv_element(kv_dtype) / gpu.decode_attention[kv_dtype].rate


class LatentAttention:
    """Latent attention (MLA). Every rank has the latents of all tokens, so SP gathers them, and heads need no keys.

    The projections from the latents are those of TP in both modes: they compute T rows for the rank's heads.
    """

    def __init__(self, decoder: Decoder, latent: Latent, layout: RankLayout, weights: Format) -> None:
        self.hidden, self.latent = decoder.layer.hidden, latent
        self.heads = decoder.layer.heads // layout.world_size
        self.weights = format_in(Place.ATTENTION, decoder, weights)

    def products(self, rows: int, sp: int) -> Iterator[Product]:
        """Yield the products of a layer. Absorbed attention multiplies by the same weights in another order."""
        latent, tokens = self.latent, rows * sp
        yield Product(rows, latent.down, self.hidden, self.weights)
        if latent.query_rank:
            yield Product(tokens, self.heads * latent.head, latent.query_rank, self.weights)
        else:
            yield Product(rows, sp * self.heads * latent.head, self.hidden, self.weights)
        yield Product(tokens, self.heads * (latent.nope + latent.value), latent.rank, self.weights)
        yield Product(rows, self.hidden, sp * self.heads * latent.value, self.weights)

    def elementwise(self, tokens: int, rows: int, sp: int) -> Iterator[float]:
        """Yield the bytes of each elementwise kernel of a layer."""
        latent, heads = self.latent, self.heads
        yield tokens * 2 * (heads + 1) * latent.rope * ELEMENT  # the rotary embedding
        yield tokens * 2 * latent.cached * ELEMENT  # the copy of the latent into the cache
        yield tokens * 2 * (latent.rank + (latent.query_rank or 0)) * ELEMENT  # the norms of the latents
        if self.weights.quantizes_inputs:
            own, whole = (self.hidden, sp * heads * latent.value), (latent.query_rank or 0, latent.rank)
            yield from (rows * (ELEMENT + 1) * size for size in own)
            yield from (tokens * (ELEMENT + 1) * size for size in whole)
        if sp > 1:
            widths = [heads * latent.value] if latent.query_rank else [heads * latent.value, heads * latent.head]
            for width in widths:
                yield from 2 * [rows * 2 * sp * width * ELEMENT]

    def messages(self, rows: int, sp: int) -> Messages:
        """Return what a layer sends: the latents of all tokens, queries if they have no latent, and the output."""
        latent, tokens = self.latent, rows * sp
        sizes = [tokens * latent.down * ELEMENT, tokens * self.heads * latent.value * ELEMENT]
        if not latent.query_rank:
            sizes.append(tokens * self.heads * latent.head * ELEMENT)
        return Messages(tuple(sizes), (rows * self.hidden * ELEMENT,))

    def seconds_per_pair(self, phase: str, gpu: Gpu, kv_dtype: str) -> float:
        """Return the seconds of a layer per pair of a query token and a KV-cache token.

        A prefill multiplies keys and values of each head. A decode multiplies all heads by the latent, and reads it
        once. The slower of the two counts, and its arithmetic has the rate of a prefill.
        """
        latent, flops = self.latent, gpu.prefill_attention.rate
        if phase == "prefill":
            return 2 * self.heads * (latent.head + latent.value) / flops
        read = latent.cached * _kv_element(kv_dtype) / gpu.decode_attention[kv_dtype].rate
        return max(read, 2 * self.heads * (latent.cached + latent.rank) / flops)


class DenseMlp:
    """An MLP that computes every token.

    Args:
        decoder: The decoder.
        place: Its place: that of dense layers, or that of shared experts.
        intermediate: Its width.
        layout: The number of ranks and their groups.
        weights: The format of the model's matrices.
    """

    def __init__(self, decoder: Decoder, place: Place, intermediate: int, layout: RankLayout, weights: Format) -> None:
        self.hidden, self.weights = decoder.layer.hidden, format_in(place, decoder, weights)
        self.shard, self.parts = intermediate // layout.world_size, 2 if decoder.gated else 1

    def products(self, rows: int, sp: int) -> Iterator[Product]:
        """Yield the products of a layer."""
        yield Product(rows, self.parts * sp * self.shard, self.hidden, self.weights)
        yield Product(rows, self.hidden, sp * self.shard, self.weights)

    def elementwise(self, tokens: int, rows: int, sp: int) -> Iterator[float]:
        """Yield the bytes of each elementwise kernel of a layer."""
        yield rows * (self.parts + 1) * sp * self.shard * ELEMENT  # the activation
        if self.weights.quantizes_inputs:
            yield from (rows * (ELEMENT + 1) * size for size in (self.hidden, sp * self.shard))

    def messages(self, rows: int, sp: int) -> Messages:
        """Return what a layer sends."""
        return Messages((), (rows * self.hidden * ELEMENT,))


class SparseMlp:
    """Routed experts, and the shared experts beside them.

    Args:
        decoder: The decoder.
        experts: Its experts.
        layout: The number of ranks and their groups.
        weights: The format of the model's matrices.
        copies: ``sharded``: in SP the rows of all ranks are gathered, each rank computes its shard of each expert, and
            the results are summed to local rows. ``replicated``: a rank computes its own rows.
    """

    def __init__(self, decoder: Decoder, experts: Experts, layout: RankLayout, weights: Format, copies: str) -> None:
        self.hidden, self.experts, self.parts = decoder.layer.hidden, experts, 2 if decoder.gated else 1
        self.shard, self.replicated = experts.intermediate // layout.world_size, copies == REPLICATED
        self.weights = format_in(Place.EXPERTS, decoder, weights)
        self.shared = DenseMlp(decoder, Place.SHARED, experts.shared, layout, weights) if experts.shared else None

    def products(self, rows: int, sp: int) -> Iterator[Product]:
        """Yield the products of a layer. One kernel multiplies the rows of all experts."""
        tokens, shard = self._work(rows, sp)
        computed, read = tokens * self.experts.per_token, self.experts.distinct(tokens)
        yield Product(rows, self.experts.count, self.hidden)  # the router
        yield Product(computed, self.parts * shard, self.hidden, self.weights, read)
        yield Product(computed, self.hidden, shard, self.weights, read)
        if self.shared:
            yield from self.shared.products(rows, sp)

    def elementwise(self, tokens: int, rows: int, sp: int) -> Iterator[float]:
        """Yield the bytes of each elementwise kernel of a layer."""
        tokens, shard = self._work(rows, sp)
        computed = tokens * self.experts.per_token
        yield tokens * 2 * self.experts.count * ELEMENT  # the choice of the experts
        yield computed * (self.parts + 1) * shard * ELEMENT  # the activation
        yield (computed + tokens) * self.hidden * ELEMENT  # the sum of a token's experts
        if self.weights.quantizes_inputs:
            yield tokens * (ELEMENT + 1) * self.hidden
            yield computed * (ELEMENT + 1) * shard
        if self.shared:
            yield from self.shared.elementwise(tokens, rows, sp)

    def messages(self, rows: int, sp: int) -> Messages:
        """Return what a layer sends. TP sums shared and routed experts together."""
        row = self.hidden * ELEMENT
        if sp == 1 or self.replicated:
            return Messages((), (rows * row,))
        tokens = rows * sp
        gathered = (tokens * row, tokens * self.experts.count * ELEMENT)  # hidden states and router logits
        sums = (rows * row, rows * row) if self.shared else (rows * row,)
        return Messages((*gathered, tokens * row), sums)

    def _work(self, rows: int, sp: int) -> tuple[int, int]:
        """Return the tokens that the rank's experts compute, and the width of its shard of an expert."""
        return (rows, sp * self.shard) if self.replicated else (rows * sp, self.shard)


Attention = HeadAttention | LatentAttention
Mlp = DenseMlp | SparseMlp


def attention_of(decoder: Decoder, layout: RankLayout, weights: Format) -> Attention:
    """Return the attention of a decoder's layers."""
    if decoder.latent:
        return LatentAttention(decoder, decoder.latent, layout, weights)
    return HeadAttention(decoder, layout, weights)


def mlps_of(decoder: Decoder, layout: RankLayout, weights: Format, copies: str) -> list[tuple[Mlp, int]]:
    """Return the MLPs of a decoder, each with the number of its layers."""
    found: list[tuple[Mlp, int]] = []
    if decoder.dense_layers:
        dense = DenseMlp(decoder, Place.MLP, decoder.layer.intermediate, layout, weights)
        found.append((dense, decoder.dense_layers))
    if decoder.experts:
        found.append((SparseMlp(decoder, decoder.experts, layout, weights, copies), decoder.experts.layers))
    return found


def _kv_element(kv_dtype: str) -> int:
    return 1 if kv_dtype == "fp8" else ELEMENT
