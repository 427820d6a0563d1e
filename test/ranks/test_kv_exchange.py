"""Merging and splitting SGLang's KV pools in place, against a formula of what each token's keys and values are.

The pools are SGLang's own. Tokens are written and read by SGLang's indices: slot, head and column.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from sglang_shift.errors import Refused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.layout import home_of, merged_pages, token_slots
from sglang_shift.kv.pool import LevelPool
from sglang_shift.parallel.level import Level

LAYERS, KV_HEADS = 2, 8
SCRATCH = 3000  # bytes: a range of the small pools has one page or a few


@dataclass(frozen=True)
class Kind:
    """A kind of pool."""

    page_size: int
    hnd: bool = False
    dtype: torch.dtype = torch.bfloat16
    widths: tuple[int, int] = (8, 8)  # of keys and of values

    def __str__(self) -> str:
        return f"{'hnd' if self.hnd else 'nhd'}-{self.page_size}-{str(self.dtype)[6:]}-{self.widths}"


KINDS = [
    Kind(1), Kind(16), Kind(64), Kind(1, hnd=True), Kind(16, hnd=True), Kind(64, hnd=True),
    Kind(4, widths=(8, 4)), Kind(2, dtype=torch.float16, widths=(3, 3)), Kind(2, dtype=torch.float8_e4m3fn),
]  # fmt: skip


def build(kind: Kind, levels: Levels, pages: int) -> LevelPool:
    """Make SGLang's pool of one rank of the whole world, with ``pages`` pages at the lowest level."""
    from sglang.srt.environ import envs
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    world = levels.world_size
    size = (pages * world // levels.lowest - 1) * kind.page_size
    with envs.SGLANG_USE_HND_KVCACHE.override(kind.hnd):
        pool = MHATokenToKVPool(
            size, kind.page_size, kind.dtype, KV_HEADS // world, kind.widths[0], LAYERS, "cpu", False,
            v_head_dim=kind.widths[1],
        )  # fmt: skip
    if kind.page_size == 1:
        allocator: Any = TokenToKVPoolAllocator(size, kind.dtype, "cpu", pool, False)
    else:
        allocator = PagedTokenToKVPoolAllocator(size, kind.page_size, kind.dtype, "cpu", pool, False)
    return LevelPool(pool, allocator, levels, KV_HEADS)


def make_levels(levels: Levels, rank: int) -> dict[int, Level]:
    """Make the groups of all levels. All ranks call it."""
    places = {}
    for size in levels.sizes:
        groups = {each: dist.new_group(list(each.ranks)) for each in levels.instances(size)}
        instance = levels.instance_of(rank, size)
        places[size] = Level(instance, rank, SimpleNamespace(device_group=groups[instance]), None)  # type: ignore[arg-type]
    return places


def tokens_of(owner: int, pages: torch.Tensor, kind: Kind) -> torch.Tensor:
    """A number for each token of some pages of an owner, all different."""
    return owner * 10_000 + token_slots(pages, kind.page_size)


def values(tokens: torch.Tensor, heads: range, layer: int, which: int, kind: Kind) -> torch.Tensor:
    """The keys (``which`` 0) or values of tokens: ``[tokens, heads, width]``, in the bytes of the pool's type."""
    width = kind.widths[which]
    head, column = torch.tensor(heads)[:, None], torch.arange(width)
    numbers = tokens[:, None, None] * 7919 + head * 104_729 + column * 31 + layer * 1009 + which * 499
    return (numbers % 251).to(torch.uint8).float().to(kind.dtype).contiguous()


def view_of(pool: Any, layer: int, which: int) -> torch.Tensor:
    buffer: torch.Tensor = (pool.k_buffer, pool.v_buffer)[which][layer]
    return buffer


def write(level_pool: LevelPool, slots: torch.Tensor, tokens: torch.Tensor, place: int, kind: Kind) -> None:
    """Store tokens in slots as a step of this rank would."""
    pool = level_pool.pool
    heads = range(place * pool.head_num, (place + 1) * pool.head_num)
    for layer in range(LAYERS):
        for which in (0, 1):
            stored, buffer = values(tokens, heads, layer, which, kind), view_of(pool, layer, which)
            stored, buffer = stored.view(pool.store_dtype), buffer.view(pool.store_dtype)
            if pool.use_hnd:
                buffer[slots // kind.page_size, :, slots % kind.page_size] = stored
            else:
                buffer[slots] = stored


def check(level_pool: LevelPool, slots: torch.Tensor, tokens: torch.Tensor, place: int, kind: Kind) -> None:
    """Check that slots hold tokens, for the heads that this rank has now."""
    pool = level_pool.pool
    heads = range(place * pool.head_num, (place + 1) * pool.head_num)
    for layer in range(LAYERS):
        for which in (0, 1):
            buffer = view_of(pool, layer, which)
            stored = buffer[slots // kind.page_size, :, slots % kind.page_size] if pool.use_hnd else buffer[slots]
            expected = values(tokens, heads, layer, which, kind).view(pool.store_dtype)
            assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8)), (pool.head_num, layer, which)


def occupancy(instances: int, last: int, seed: int) -> list[torch.Tensor]:
    """Random pages of each instance, in random order. One instance has none, and another one has all."""
    generator = torch.Generator().manual_seed(seed)
    counts = [int(torch.randint(1, last, (1,), generator=generator)) for _ in range(instances)]
    if instances > 1:
        counts[seed % instances], counts[(seed + 1) % instances] = 0, last
    return [torch.randperm(last, generator=generator)[:count] + 1 for count in counts]


def check_pair(rank: int, pool: LevelPool, places: dict[int, Level], low: int, high: int, kind: Kind) -> None:
    """Merge instances of one level into one of another, and split it again, with some pages only."""
    pool.enter(low)
    small, large = places[low], places[high]
    factor, first = high // low, large.instance.leader // low
    part = small.instance.index - first
    pages = occupancy(factor, pool.layout.last_page(low), seed=17 * low + high + first)
    write(pool, token_slots(pages[part], kind.page_size), tokens_of(part, pages[part], kind), small.place, kind)

    volume = pool.merge(large, pages, SCRATCH)
    assert pool.level == high and pool.pool.head_num == KV_HEADS // high
    for number, each in enumerate(pages):
        slots = token_slots(merged_pages(each, number, factor), kind.page_size)
        check(pool, slots, tokens_of(number, each, kind), large.place, kind)
    page_bytes = kind.page_size * KV_HEADS // low * sum(kind.widths) * kind.dtype.itemsize * LAYERS
    peers = [small.place * factor + g for g in range(factor) if small.place * factor + g != large.place]
    assert volume.sent_bytes == len(pages[part]) * page_bytes * len(peers) // factor
    one_page = 2 * kind.page_size * KV_HEADS // low * max(kind.widths) * kind.dtype.itemsize
    assert volume.scratch_bytes <= max(SCRATCH, one_page)

    kept = [each[::2] for each in pages]
    pool.split(large, low, kept, SCRATCH)
    assert pool.level == low and pool.pool.head_num == KV_HEADS // low
    check(pool, token_slots(kept[part], kind.page_size), tokens_of(part, kept[part], kind), small.place, kind)


def check_exchanges(rank: int, world: int, kind: Kind) -> None:
    levels = Levels.between(1, world)
    places = make_levels(levels, rank)
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
    held = [(each, tokens_of(owner, each, kind)) for owner, each in enumerate(occupancy(levels.world_size, last, 5))]
    own = [held[rank]]  # what this rank's instance holds: pages and their tokens
    write(pool, token_slots(own[0][0], kind.page_size), own[0][1], 0, kind)
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
    write(pool, token_slots(new, kind.page_size), own[-1][1], rank, kind)

    kept: list[list[torch.Tensor]] = [[] for _ in range(levels.world_size)]
    mine = []
    for pages, tokens in own:
        homes, numbers = home_of(pages, levels.world_size)
        for part, each in enumerate(kept):
            each.append(numbers[homes == part])
        mine.append((numbers[homes == rank], tokens.view(len(pages), kind.page_size)[homes == rank].flatten()))
    pool.split(places[levels.world_size], levels.lowest, [torch.cat(each) for each in kept], SCRATCH)
    for pages, tokens in mine:
        check(pool, token_slots(pages, kind.page_size), tokens, 0, kind)


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
