"""Attention of a prompt's chunk to its prefix that leaves out blocks of keys, and measures what it leaves out.

The softmax of a query gives each key a share of 1. The *dropped mass* of a query is the sum of the shares of the keys
that are left out. If it is m, the output differs from that of all keys by at most ``2 * m * max|v|``: the exact output
is ``(1 - m)`` times the sparse one, plus m times a mean of the values that are left out.

A bound on the mean of the dropped masses hides the few queries that retrieve something: all that they look for may be
in a block that no other query needs. So the bound is on the largest dropped mass. It is exact, because the scores of
all queries and keys are computed. What is saved is the product of the shares and the values, for the blocks that are
left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from sglang_shift.platforms.attention import Part, attend

BLOCK = 64
"""Keys in a block. All of them are computed, or none."""
QUERY_BLOCK = 64
"""New tokens that choose together, for each of their heads."""
LOCAL_BLOCKS = 2
"""Blocks at the end of the prefix that are always computed, with the keys after the last whole block."""

BINS_PER_DECADE, DECADES = 25, 8
BINS = BINS_PER_DECADE * DECADES + 1
"""Bins of the histogram of dropped masses. The first one is for masses of at most ``10**-DECADES``."""


class DroppedMass:
    """The dropped masses of queries, and the work that was saved for them.

    A query is one head of one token in one layer. Work is counted in pairs of a query and a key that it may attend to.

    Attributes:
        counts: Of the queries, by bin of their dropped mass.
        total: The sum of the dropped masses.
        largest: The largest dropped mass.
        pairs: All pairs.
        computed: The pairs whose value was used.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.total = self.largest = 0.0
        self.pairs = self.computed = 0

    def add(self, masses: torch.Tensor, pairs: int, computed: int) -> None:
        """Add queries with their dropped masses, and their pairs."""
        bins = torch.ceil((masses.double().clamp(min=10.0**-DECADES).log10() + DECADES) * BINS_PER_DECADE - 1e-9)
        self.counts += torch.bincount(bins.long().clamp(0, BINS - 1).flatten(), minlength=BINS)
        self.total += float(masses.sum(dtype=torch.float64))
        self.largest = max(self.largest, float(masses.max()))
        self.pairs += pairs
        self.computed += computed

    def numbers(self) -> list[float]:
        """All that this object knows, for :meth:`include` on another rank."""
        return [*self.counts.tolist(), self.total, self.largest, float(self.pairs), float(self.computed)]

    def include(self, numbers: Sequence[float]) -> None:
        """Add the queries of another object, of which these are the :meth:`numbers`."""
        *counts, total, largest, pairs, computed = numbers
        self.counts += torch.tensor(counts, dtype=torch.float64)
        self.total += total
        self.largest = max(self.largest, largest)
        self.pairs += int(pairs)
        self.computed += int(computed)

    @property
    def mean(self) -> float:
        """The mean dropped mass; 0 without queries."""
        return self.total / max(1.0, float(self.counts.sum()))

    @property
    def p99(self) -> float:
        """A mass that 99 % of the queries do not exceed: the end of its bin, which is up to 10 % more than needed."""
        queries = float(self.counts.sum())
        if not queries:
            return 0.0
        place = int((self.counts.cumsum(0) < 0.99 * queries).sum())
        return min(self.largest, 10.0 ** (place / BINS_PER_DECADE - DECADES))

    @property
    def computed_share(self) -> float:
        """The share of the pairs whose value was used; 1 without pairs."""
        return self.computed / self.pairs if self.pairs else 1.0


class SparseStep(NamedTuple):
    """The requests of a step whose chunks leave out blocks.

    Attributes:
        bound: The dropped mass that no query exceeds.
        records: For each of these requests, by its index in the batch, what its layers drop.
    """

    bound: float
    records: Mapping[int, DroppedMass]


def choose_blocks(shares: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the blocks that these queries compute: as many as possible are left out, the lightest first.

    Args:
        shares: ``[queries, blocks]``: the share of the softmax that each block has.
        bound: The dropped mass that no query exceeds.

    Returns:
        ``[blocks]``, bool: whether a block is computed; and ``[queries]``, the dropped masses.
    """
    order = shares.amax(0).argsort()
    dropped = shares[:, order].cumsum(1)
    count = int((dropped.amax(0) <= bound).sum())
    computed = torch.ones(shares.shape[1], dtype=torch.bool, device=shares.device)
    computed[order[:count]] = False
    return computed, dropped[:, count - 1] if count else torch.zeros_like(shares[:, 0])


def attend_sparsely(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    bound: float,
    record: DroppedMass,
    cap: float = 0.0,
) -> Part:
    """Return causal attention of one request's new tokens, without the blocks of the prefix that hold little mass.

    The first block, the last blocks and the new tokens' own keys are always computed. Each :data:`QUERY_BLOCK` of
    tokens chooses among the other blocks, for each head.

    Args:
        query: ``[new tokens, heads, width]``.
        key: ``[keys, KV heads, width]``. The new tokens' own keys come last.
        value: ``[keys, KV heads, value width]``.
        scale: The factor of the scores.
        bound: The dropped mass that no query exceeds.
        record: Gets the dropped masses and the pairs.
        cap: If positive, a score ``s`` becomes ``cap * tanh(s / cap)``.

    Returns:
        A part like that of :func:`attend`, over the keys that are computed.
    """
    new, heads, _ = query.shape
    prefix = key.shape[0] - new
    first, last = BLOCK, max(BLOCK, (prefix // BLOCK - LOCAL_BLOCKS) * BLOCK)
    sure = attend(query, without(key, first, last), without(value, first, last), scale=scale, cap=cap)
    pairs = heads * (new * prefix + new * (new + 1) // 2)
    if first == last:
        record.add(torch.zeros_like(sure.lse), pairs, pairs)
        return sure
    shared = heads // key.shape[1]
    masses, computed = torch.zeros_like(sure.lse), pairs
    for head in range(heads):
        k, v = key[first:last, head // shared], value[first:last, head // shared]
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        for start in range(0, new, QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            scores = scores_of(query[rows, head], k, scale, cap)
            own = Part(sure.output[rows, head], sure.lse[rows, head])
            part, masses[rows, head], skipped = with_heavy_blocks(own, scores, v, bound)
            sure.output[rows, head], sure.lse[rows, head] = part
            computed -= scores.shape[0] * skipped * BLOCK
    record.add(masses, pairs, computed)
    return sure


def without(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """``x`` without its rows from ``first`` to ``last``."""
    return torch.cat([x[:first], x[last:]]) if last > first else x


def scores_of(query: torch.Tensor, key: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """``[queries, keys]``: the scores in float32, or in float64 for float64."""
    wide = torch.promote_types(query.dtype, torch.float32)  # rounded scores would be other masses
    scores = query.to(wide) @ key.to(wide).T * scale
    return torch.tanh(scores / cap) * cap if cap > 0 else scores


def with_heavy_blocks(
    sure: Part, scores: torch.Tensor, value: torch.Tensor, bound: float
) -> tuple[Part, torch.Tensor, int]:
    """Add the blocks to a part that these queries do not leave out.

    Args:
        sure: Attention of the queries to the keys that are always computed: ``[queries, value width]``.
        scores: ``[queries, blocks * BLOCK]``. This function overwrites them.
        value: ``[blocks * BLOCK, value width]``.
        bound: The dropped mass that no query exceeds.

    Returns:
        The part, the dropped masses, ``[queries]``, and the number of blocks that are left out.
    """
    top = torch.maximum(scores.amax(1), sure.lse).unsqueeze(1)
    weights = scores.sub_(top).exp_().view(scores.shape[0], -1, BLOCK)
    masses, rest = weights.sum(2), torch.exp(sure.lse.unsqueeze(1) - top)
    computed, dropped = choose_blocks(masses / (masses.sum(1, keepdim=True) + rest), bound)
    skipped = int((~computed).sum())
    if skipped:
        weights, masses = weights[:, computed], masses[:, computed]
        value = value.view(-1, BLOCK, value.shape[1])[computed].flatten(0, 1)
    total = masses.sum(1, keepdim=True) + rest
    output = (weights.flatten(1).to(value.dtype) @ value + sure.output * rest) / total
    return Part(output.to(sure.output.dtype), (total.log() + top).squeeze(1)), dropped, skipped
