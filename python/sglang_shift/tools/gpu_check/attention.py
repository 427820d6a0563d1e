"""Checks FlashAttention 3 as ``--dcp-size`` calls it: parts of requests, with the log-sum-exp, and their merge.

The reference is plain attention in float32 with the same keys.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from sglang_shift.platforms.attention import Part, merge_all
from sglang_shift.platforms.fa3 import FlashAttention3, Kernels, Pages, Spans, attend_stored
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.timing import capture_graph

OUTPUT_TOLERANCE = 0.05
"""The largest error of an output in bfloat16. The largest values are above 4, where bfloat16 rounds by 0.016 at most,
and the parts and their merge are rounded one after the other."""

LSE_TOLERANCE, CAPPED_LSE_TOLERANCE = 0.005, 0.03
"""The largest error of a log-sum-exp, which has float32. If scores are capped, a GPU's fast ``tanh`` is less exact."""

LENGTHS = (1, 2, 3, 64, 700, 4096)
"""The tokens of the requests. If 4 ranks divide them, some ranks have none of the first three."""

NEWS = (5, 1, 130, 64, 1, 33)
"""The new tokens of the requests in an extend."""


@dataclass(frozen=True)
class Shape:
    """One layer on one rank.

    Attributes:
        heads: Query heads of all ranks that share the keys.
        kv_heads: Their KV heads.
        width: The elements of a head.
        page_size: The rows of a page of the pool.
        cap: The cap of the scores; 0 for none.
    """

    heads: int
    kv_heads: int
    width: int = 128
    page_size: int = 1
    cap: float = 0.0


SHAPES = [
    Shape(heads, kv_heads, page_size=page_size, cap=cap)
    for (heads, kv_heads), page_size, cap in itertools.product(((8, 1), (32, 1), (8, 2)), (1, 16, 64), (0.0, 30.0))
] + [Shape(8, 1, width=64)]


class Errors(NamedTuple):
    """The largest error of an output, and of a log-sum-exp. It is infinite if one is not a number."""

    output: float
    lse: float


def check_fa3(record: Record) -> None:
    """Check the kernels on this GPU, if SGLang has FlashAttention 3 for it."""
    need_fa3()
    compare(record, FlashAttention3(), SHAPES, torch.bfloat16, torch.device("cuda"))


def need_fa3() -> None:
    """Skip the check if SGLang has no FlashAttention 3 for this GPU."""
    major, minor = torch.cuda.get_device_capability()
    if major not in (8, 9):
        pytest.skip(f"SGLang has FlashAttention 3 for compute capability 8 and 9, and this GPU has {major}.{minor}")


def compare(record: Record, kernels: Kernels, shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> None:
    """Compare all calls that a step makes with the reference, with each shape."""
    worst = Errors(0.0, 0.0)
    for shape in shapes:
        trial = Trial(shape, kernels, dtype, device)
        allowed = Errors(OUTPUT_TOLERANCE, CAPPED_LSE_TOLERANCE if shape.cap else LSE_TOLERANCE)
        errors = {
            "decode": trial.stored([1] * len(LENGTHS)),
            "queries to prefixes": trial.stored(list(NEWS)),
            "chunk": trial.rows(NEWS, causal=True),
            "prefixes to queries": trial.rows(LENGTHS, causal=False),
        }
        if device.type == "cuda":
            errors["decode as a graph"] = trial.replayed()
        for name, error in errors.items():
            record.row(**vars(shape), call=name, output=round(error.output, 5), lse=round(error.lse, 5))
            for what, value, limit in zip(Errors._fields, error, allowed, strict=True):
                if value > limit:
                    record.problem(f"{name} of {shape}: the error of {what} is {value:.3g}, more than {limit}")
            worst = Errors(*map(max, worst, error))
    record.note(
        f"{len(shapes)} shapes: the largest error of an output is {worst.output:.3g}, of an lse {worst.lse:.3g}"
    )


class Trial:
    """Random requests whose keys 4 ranks divide by token, all on this device.

    Args:
        shape: The layer.
        kernels: What to check.
        dtype: Of queries, keys and values.
        device: Where all is.
    """

    ranks = 4

    def __init__(self, shape: Shape, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.kernels, self.dtype, self.device = shape, kernels, dtype, device
        self.options = {"scale": shape.width**-0.5, "cap": shape.cap}
        self.generator = torch.Generator(device).manual_seed(0)
        self.keys = [self.random(length, shape.kv_heads) for length in LENGTHS]
        self.values = [self.random(length, shape.kv_heads) for length in LENGTHS]

    def random(self, rows: int, heads: int) -> torch.Tensor:
        """Numbers of a normal distribution, with a spread that makes attention to some keys much larger."""
        size = (rows, heads, self.shape.width)
        return torch.randn(size, generator=self.generator, device=self.device).to(self.dtype)

    def stored(self, news: list[int]) -> Errors:
        """The errors of attention to the parts of all ranks, merged."""
        query = 2 * self.random(sum(news), self.shape.heads)
        parts = [self.of_rank(rank, query, news) for rank in range(self.ranks)]
        merged = merge_all(Part(torch.stack([p.output for p in parts]), torch.stack([p.lse for p in parts])))
        return self.error(merged, query, news, self.keys, self.values, causal=False)

    def of_rank(self, rank: int, query: torch.Tensor, news: list[int]) -> Part:
        """Attention to the part of a rank."""
        keys, values, pages = self.pool(rank)
        return attend_stored(self.kernels, query, keys, values, Spans.of(news, self.device), pages, **self.options)

    def pool(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, Pages]:
        """A pool with the part of a rank, in pages of no order. Unused rows are not numbers."""
        size = self.shape.page_size
        own = [range(rank, length, self.ranks) for length in LENGTHS]
        counts = [-(-len(each) // size) for each in own]
        order = (torch.randperm(sum(counts), generator=self.generator, device=self.device) + 1).split(counts)
        table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32, device=self.device)
        shape = (sum(counts) + 1, size, self.shape.kv_heads, self.shape.width)
        pools = [torch.full(shape, torch.nan, dtype=self.dtype, device=self.device) for _ in range(2)]
        for i, pages in enumerate(order):
            table[i, : len(pages)] = pages
            for pool, all_rows in zip(pools, (self.keys[i], self.values[i]), strict=True):
                rows = all_rows[rank :: self.ranks]
                at = torch.arange(rows.shape[0], device=self.device)
                pool[pages[at // size], at % size] = rows
        lengths = torch.tensor([len(each) for each in own], dtype=torch.int32, device=self.device)
        return *pools, Pages(table, lengths)

    def rows(self, keys: tuple[int, ...], *, causal: bool) -> Errors:
        """The errors of attention to keys side by side: as many as new tokens, or whole prefixes."""
        query = 2 * self.random(sum(NEWS), self.shape.heads)
        key, value = (self.random(sum(keys), self.shape.kv_heads) for _ in range(2))
        spans = Spans.of(list(NEWS), self.device), Spans.of(list(keys), self.device)
        part = self.kernels.attend_rows(query, key, value, *spans, causal=causal, **self.options)
        split = (list(x.split(keys)) for x in (key, value))
        return self.error(part, query, list(NEWS), *split, causal=causal)

    def replayed(self) -> Errors:
        """The errors of a decode as a graph, captured with other lengths and pages, on a rank without some requests."""
        rank = self.ranks - 1
        news = [1] * len(LENGTHS)
        query = 2 * self.random(sum(news), self.shape.heads)
        keys, values, pages = self.pool(rank)
        table, lengths = torch.zeros_like(pages.table), torch.zeros_like(pages.lengths)
        spans, static = Spans.of(news, self.device), Pages(table, lengths)
        graph, part = capture_graph(
            lambda: attend_stored(self.kernels, query, keys, values, spans, static, **self.options)
        )
        table.copy_(pages.table)
        lengths.copy_(pages.lengths)
        graph.replay()
        shards = ([x[rank :: self.ranks] for x in each] for each in (self.keys, self.values))
        return self.error(part, query, news, *shards, causal=False)

    def error(
        self, part: Part, query: torch.Tensor, news: list[int], keys: list[torch.Tensor], values: list[torch.Tensor],
        *, causal: bool,
    ) -> Errors:  # fmt: skip
        """The errors of attention of each request to its keys, of which it may have none."""
        expected = [
            plain(rows, key, value, causal=causal, **self.options)
            for rows, key, value in zip(query.split(news), keys, values, strict=True)
        ]
        output, lse = (torch.cat(each) for each in zip(*expected, strict=True))
        of_lse = torch.where(part.lse == lse, 0, part.lse - lse)  # -inf less -inf is not a number
        errors = ((part.output.float() - output).abs().max(), of_lse.abs().max())
        return Errors(*(error.nan_to_num(torch.inf).item() for error in errors))


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, cap: float, causal: bool
) -> Part:
    """Attention of one request in float32."""
    query, key, value = (x.float().transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    scores = query @ key.transpose(1, 2) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return Part((scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1).transpose(0, 1))
