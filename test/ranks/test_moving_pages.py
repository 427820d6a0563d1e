"""Pages that move between FFN weights and a KV cache while four ranks merge and split: no byte is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks
from kv_pools import KV_HEADS, Kind, build, check, heads_of, make_levels, occupancy, tokens_of, write
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang_shift.errors import Refused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.layout import merged_pages, token_slots
from sglang_shift.kv.pool import LevelPool
from sglang_shift.memory.host import HostDevice
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.level import Level
from sglang_shift.runtime.moving_pages import MovingPages, device_of
from sglang_shift.weights.base_weights import BaseWeight

PAGE = 4096
HIDDEN = 24
ROWS = (190, 70, 3)
"""Rows of a block of each weight: several pages, about a page and a half, and much less than a page."""


class Column(ColumnParallelLinear):
    """What a base weight reads of SGLang's linear."""

    def __init__(self, weight: torch.Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def make_bases(index: int, blocks: int, seed: int = 3) -> list[BaseWeight]:
    """Base weights of both kinds, with the shards of ``blocks`` ranks. Ranks with the same seed have the same ones."""
    bases = []
    generator = torch.Generator().manual_seed(seed)
    for rows in ROWS:
        for dim in (0, 1):
            weight = torch.randn(blocks * rows, HIDDEN, generator=generator)
            weight = weight if dim == 0 else weight.t().contiguous()
            shard = weight.narrow(dim, index * rows, rows)
            row = SimpleNamespace(weight=torch.nn.Parameter(shard, requires_grad=False))
            linear = Column(shard) if dim == 0 else row
            bases.append(BaseWeight(linear, SimpleNamespace(sp_index=index), weight, None))  # type: ignore[arg-type]
    return bases


class Rank:
    """A rank of the world with its weights and its cache."""

    def __init__(self, rank: int, world: int, levels: Levels, kind: Kind, width: int) -> None:
        self.rank, self.world, self.levels, self.kind = rank, world, levels, kind
        self.width, self.blocks = width, world // width
        self.places: dict[int, Level] = make_levels(levels, rank, width)
        self.pool: LevelPool = build(kind, levels, pages=7)
        self.common = {level: self.pool.layout.last_page(level) for level in levels.sizes}
        bases = make_bases(rank // width, self.blocks, seed=3 + rank % width)
        self.expected = [base.weight.clone() for base in bases]
        self.device = HostDevice(PAGE)
        self.moving = MovingPages(self.device, bases, self.pool, self.places, levels)
        self.pool.enter(levels.lowest)
        self.bases = bases
        self.before = self.facts()

    def facts(self) -> Any:
        """What no change of the level may change."""
        tensors = [base.weight for base in self.bases] + [base.linear.weight for base in self.bases]
        tensors += [memory.elements for memory in self.pool.memories]
        return [t.data_ptr() for t in tensors], self.device.count, self.device.resident_bytes

    def check_weights(self) -> None:
        """The blocks of this rank are as they were, its other pages are gone, and the number of pages is the same."""
        level = self.pool.level
        own = slice(0, self.blocks) if level == self.levels.lowest else self.own(self.rank, level)
        for base, whole, paged in zip(self.bases, self.expected, self.moving.weights.weights, strict=True):
            rows, expected = (base.weight, whole) if isinstance(base.linear, Column) else (base.weight.t(), whole.t())
            block = len(rows) // self.blocks
            held = slice(own.start * block, own.stop * block)
            assert torch.equal(rows[held], expected[held])
            assert level != self.world or torch.equal(base.linear.weight, self.shard(whole, base))
            begin, end = (each * block * HIDDEN * 4 for each in (own.start, own.stop))
            assert sorted(paged.reservation.mapped) == list(range(begin // PAGE, -(-end // PAGE)))
            assert base.complete is (level == self.levels.lowest)
        assert self.facts() == self.before

    def own(self, rank: int, level: int) -> slice:
        """The blocks of a rank at a merged level, of those of the base weight."""
        count = self.world // level
        place = rank % level // self.width
        return slice(place * count, (place + 1) * count)

    def shard(self, whole: torch.Tensor, base: BaseWeight) -> torch.Tensor:
        size = whole.shape[base.shard_dim] // self.blocks
        return whole.narrow(base.shard_dim, self.rank // self.width * size, size)

    def check_capacity(self) -> None:
        """Each level has as many pages as fit into the memory that all its ranks can free, and the lowest has none."""
        page = self.kind.page_size * KV_HEADS * sum(self.kind.widths) * self.kind.dtype.itemsize
        assert self.kind.widths[0] == self.kind.widths[1]
        buffers = len(self.pool.memories)
        for level in self.levels.sizes:
            extra = self.pool.layout.last_page(level) - self.common[level]
            if level == self.levels.lowest:
                assert extra == 0
                continue
            of_page = page // 2 // level
            size = 7 * page // 2 // self.levels.lowest
            freed = min(self.freed(rank, level) for rank in range(self.world))
            more = lambda n: -(-(size + n * of_page) // PAGE) - -(-size // PAGE)  # noqa: B023, E731
            assert buffers * more(extra) <= freed < buffers * more(extra + 1)

    def freed(self, rank: int, level: int) -> int:
        """The pages without a byte of a rank's own blocks, counted one by one."""
        pages, own = 0, self.own(rank, level)
        for rows in ROWS:
            block = rows * HIDDEN * 4
            for number in range(-(-self.blocks * block // PAGE)):
                begin, end = number * PAGE, (number + 1) * PAGE
                pages += 2 * (end <= own.start * block or begin >= own.stop * block)
        return pages

    def change(self, to: int, seed: int) -> None:
        """Go to another level with random pages in use, at the end of the cache as well."""
        level, kind = self.pool.level, self.kind
        low, high = sorted((level, to))
        small, large, factor = self.places[low], self.places[high], high // low
        part = small.instance.index - large.instance.leader // low
        pages = occupancy(factor, self.pool.layout.last_page(low), seed=seed + large.instance.leader)

        def at(level: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
            """The slots at a level of the tokens of a part, and the tokens."""
            numbers = pages[number] if level == low else merged_pages(pages[number], number, factor)
            return token_slots(numbers, kind.page_size), tokens_of(number, pages[number], kind)

        parts = {low: [part], high: list(range(factor))}
        for number in parts[level]:
            write(self.pool, *at(level, number), heads_of(self.places, level), kind)
        if to > level:
            self.pool.merge(large, pages)
        else:
            self.pool.split(large, low, pages)
        self.moving.enter(to)
        for number in parts[to]:
            check(self.pool, *at(to, number), heads_of(self.places, to), kind)
        self.pool.keep(torch.arange(1, self.pool.layout.last_page(to)))
        assert len(self.pool.allocator.get_all_free_pages()) == 1, "the allocator counts all pages"


def check_walk(rank: int, world: int, levels: Levels, walk: tuple[int, ...], kind: Kind, width: int = 1) -> None:
    mine = Rank(rank, world, levels, kind, width)
    mine.check_capacity()
    mine.check_weights()
    for number, level in enumerate(walk):
        mine.change(level, 100 * number)
        mine.check_weights()
        if level == world and number % 2:  # SGLang updates the shards of the whole world
            for base, whole in zip(mine.bases, mine.expected, strict=True):
                base.linear.weight.data.add_(number)
                whole.add_(number)


@pytest.mark.parametrize("kind", [Kind(1), Kind(4, hnd=True), Kind(2, dtype=torch.float32)], ids=str)
@pytest.mark.parametrize(
    ("sizes", "walk"),
    [((1, 2, 4), (2, 4, 2, 4, 1, 4, 2, 1, 2, 1)), ((1, 4), (4, 1, 4, 1)), ((2, 4), (4, 2, 4, 2))],
    ids=str,
)
def test_pages_move_between_weights_and_cache(sizes, walk, kind):
    run_ranks(4, check_walk, Levels(sizes), walk, kind)


@pytest.mark.parametrize(
    ("ranks", "sizes", "walk"),
    [
        (4, (2, 4), (4, 2, 4, 2)),
        pytest.param(8, (2, 4, 8), (4, 8, 4, 8, 2, 8, 4, 2, 4, 2), marks=pytest.mark.full),
        pytest.param(8, (4, 8), (8, 4, 8, 4), marks=pytest.mark.full),
    ],
)
def test_pages_move_with_weights_that_ranks_divide(ranks, sizes, walk):
    run_ranks(ranks, check_walk, Levels(sizes), walk, Kind(2), 2)


def test_what_the_log_says():
    levels = Levels((1, 2))
    place = SimpleNamespace(rank=0, topology=SimpleNamespace(layout=RankLayout(2, 2)))
    pool = build(Kind(1), levels, pages=7)
    places: Any = {1: place, 2: place}
    moving = MovingPages(HostDevice(PAGE), make_bases(0, 2), pool, places, levels)
    text = moving.text()
    assert "of FFN weights are on pages of 0.00390625 MiB" in text and "to pad all shards to whole pages" in text
    assert f"% of the other ranks' shards, for {pool.layout.tokens(2) - 12} more tokens" in text
    assert 0 < moving.room[2] * PAGE < moving.weights.nbytes


def test_what_is_refused():
    with pytest.raises(Refused, match="--merge-weights free was never run on the device cuda, only on CPUs"):
        device_of("cuda")
    with pytest.raises(Refused, match="no FFNs that ranks divide"):
        MovingPages(HostDevice(PAGE), [], None, {}, Levels((1, 2)))  # type: ignore[arg-type]
