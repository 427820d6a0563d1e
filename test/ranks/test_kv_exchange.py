"""Merging and splitting SGLang's KV pools in place, against a formula of what each token's keys and values are.

The pools are SGLang's own. Tokens are written and read by SGLang's indices: slot, head and column.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from kv_pools import KV_HEADS, LAYERS, Kind, build, check, heads_of, make_levels, occupancy, tokens_of, write
from sglang_shift.errors import Refused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.layout import home_of, merged_pages, token_slots
from sglang_shift.kv.pool import LevelPool
from sglang_shift.parallel.level import Level

SCRATCH = 3000  # bytes: a range of the small pools has one page or a few

KINDS = [
    Kind(1), Kind(16), Kind(64), Kind(1, hnd=True), Kind(16, hnd=True), Kind(64, hnd=True),
    Kind(4, widths=(8, 4)), Kind(2, dtype=torch.float16, widths=(3, 3)), Kind(2, dtype=torch.float8_e4m3fn),
]  # fmt: skip


def check_pair(rank: int, pool: LevelPool, places: dict[int, Level], low: int, high: int, kind: Kind) -> None:
    """Merge instances of one level into one of another, and split it again, with some pages only."""
    pool.enter(low)
    small, large = places[low], places[high]
    factor, first = high // low, large.instance.leader // low
    part = small.instance.index - first
    pages = occupancy(factor, pool.layout.last_page(low), seed=17 * low + high + first)
    write(
        pool, token_slots(pages[part], kind.page_size), tokens_of(part, pages[part], kind), heads_of(places, low), kind
    )

    volume = pool.merge(large, pages, SCRATCH)
    assert pool.level == high and pool.pool.head_num == KV_HEADS // high
    for number, each in enumerate(pages):
        slots = token_slots(merged_pages(each, number, factor), kind.page_size)
        check(pool, slots, tokens_of(number, each, kind), heads_of(places, high), kind)
    page_bytes = kind.page_size * KV_HEADS // low * sum(kind.widths) * kind.dtype.itemsize * LAYERS
    ranks = range(small.topology.sp_index * factor, (small.topology.sp_index + 1) * factor)
    peers = [each for each in ranks if each != large.topology.sp_index]
    assert volume.sent_bytes == len(pages[part]) * page_bytes * len(peers) // factor
    one_page = 2 * kind.page_size * KV_HEADS // low * max(kind.widths) * kind.dtype.itemsize
    assert volume.scratch_bytes <= max(SCRATCH, one_page)

    kept = [each[::2] for each in pages]
    pool.split(large, low, kept, SCRATCH)
    assert pool.level == low and pool.pool.head_num == KV_HEADS // low
    check(pool, token_slots(kept[part], kind.page_size), tokens_of(part, kept[part], kind), heads_of(places, low), kind)


def check_exchanges(rank: int, world: int, kind: Kind, width: int = 1) -> None:
    levels = Levels.between(width, world)
    places = make_levels(levels, rank, width)
    pool = build(kind, levels, pages=7)
    addresses = [memory.elements.data_ptr() for memory in pool.memories]
    for low in levels.sizes:
        for high in levels.sizes:
            if low < high:
                check_pair(rank, pool, places, low, high, kind)
    check_stairs(rank, pool, places, levels, kind)
    assert [memory.elements.data_ptr() for memory in pool.memories] == addresses


def check_stairs(rank: int, pool: LevelPool, places: dict[int, Level], levels: Levels, kind: Kind) -> None:
    """Merge level by level, use free pages of the allocator at the top, and split directly to the lowest level."""
    pool.enter(levels.lowest)
    last = pool.layout.last_page(levels.lowest)
    count, number_of_instance = levels.world_size // levels.lowest, levels.instance_of(rank, levels.lowest).index
    held = [(each, tokens_of(owner, each, kind)) for owner, each in enumerate(occupancy(count, last, 5))]
    own = [held[number_of_instance]]  # what this rank's instance holds: pages and their tokens
    write(pool, token_slots(own[0][0], kind.page_size), own[0][1], heads_of(places, levels.lowest), kind)
    for low, high in zip(levels.sizes, levels.sizes[1:], strict=False):
        members = levels.instance_of(rank, high).parts(low)
        everyone = gather([(rank, own)])
        holdings = [dict(everyone)[member.leader] for member in members]
        pool.merge(places[high], [torch.cat([pages for pages, _ in each]) for each in holdings], SCRATCH)
        own = [(merged_pages(p, number, 2), t) for number, each in enumerate(holdings) for p, t in each]
    taken = torch.cat([pages for pages, _ in own])
    pool.keep(taken)
    free = pool.allocator.get_all_free_pages()
    assert len(free) + len(taken) == pool.layout.last_page(levels.world_size)
    assert pool.allocator.available_size() == len(free) * kind.page_size
    new = free[:3]
    own.append((new, tokens_of(99, new, kind)))
    write(pool, token_slots(new, kind.page_size), own[-1][1], heads_of(places, levels.world_size), kind)

    kept: list[list[torch.Tensor]] = [[] for _ in range(count)]
    mine = []
    for pages, tokens in own:
        homes, numbers = home_of(pages, count)
        for part, each in enumerate(kept):
            each.append(numbers[homes == part])
        here = homes == number_of_instance
        mine.append((numbers[here], tokens.view(len(pages), kind.page_size)[here].flatten()))
    pool.split(places[levels.world_size], levels.lowest, [torch.cat(each) for each in kept], SCRATCH)
    for pages, tokens in mine:
        check(pool, token_slots(pages, kind.page_size), tokens, heads_of(places, levels.lowest), kind)


def gather(items: list[Any]) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return [item for each in everyone for item in each]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_pair_of_levels(kind):
    run_ranks(4, check_exchanges, kind)


@pytest.mark.full
@pytest.mark.parametrize("kind", [Kind(1), Kind(16, hnd=True)], ids=str)
def test_every_pair_of_levels_of_eight_ranks(kind):
    run_ranks(8, check_exchanges, kind)


@pytest.mark.parametrize("kind", [Kind(1), Kind(4, widths=(8, 4)), Kind(16, hnd=True)], ids=str)
@pytest.mark.parametrize(
    ("ranks", "width"), [(4, 2), pytest.param(8, 2, marks=pytest.mark.full), pytest.param(8, 4, marks=pytest.mark.full)]
)
def test_every_pair_of_levels_with_weights_that_ranks_divide(ranks, width, kind):
    run_ranks(ranks, check_exchanges, kind, width)


def check_wrong_pages(rank: int, world: int) -> None:
    levels = Levels.between(1, world)
    places = make_levels(levels, rank)
    pool = build(Kind(1), levels, pages=7)
    pool.enter(1)
    some = torch.tensor([1, 2])
    for pages, message in (
        ([some], "2 instances of level 1 merge, but there are 1 lists"),
        ([some, torch.tensor([0, 3])], "pages 0 to 3 are not among pages 1 to 6"),
        ([torch.tensor([7]), some], "pages 7 to 7 are not among pages 1 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.merge(places[2], pages)
    assert pool.level == 1, "a refused exchange changes nothing"


def test_pages_that_do_not_exist_are_errors():
    run_ranks(2, check_wrong_pages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_num": 1}, "the model has 8 KV heads; use at most 8 ranks"),
        ({"size": 12}, r"has 12 tokens, which the 2 instances of a split cannot .* give it 11 tokens"),
        ({"kv_cache_layout": "vectorized_5d"}, r"of the kind MHATokenToKVPool \(vectorized_5d\)"),
        ({"quant_method": object()}, "leave out --kv-cache-dtype"),
        ({"post_capture_active": True}, "whose memory SGLang allocates or copies by address"),
    ],
)
def test_pools_that_instances_cannot_share(change, message):
    levels = Levels.between(1, 2)
    good = build(Kind(1), levels, pages=7)
    vars(good.pool).update(change)
    with pytest.raises(Refused, match=message):
        LevelPool(good.pool, good.allocator, levels, KV_HEADS)


def test_allocators_that_instances_cannot_share():
    levels = Levels.between(1, 2)
    good = build(Kind(1), levels, pages=7)
    with pytest.raises(Refused, match="with the allocator SimpleNamespace"):
        LevelPool(good.pool, SimpleNamespace(), levels, KV_HEADS)
    with pytest.raises(Refused, match="of the kind SimpleNamespace"):
        LevelPool(SimpleNamespace(head_num=4), good.allocator, levels, KV_HEADS)
