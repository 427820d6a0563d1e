"""SGLang's KV pools at several levels, and tokens whose keys and values follow from a formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.layout import token_slots
from sglang_shift.kv.pool import LevelPool
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.level import Level
from sglang_shift.parallel.topology import Topology

LAYERS, KV_HEADS = 2, 8


@dataclass(frozen=True)
class Kind:
    """A kind of pool."""

    page_size: int
    hnd: bool = False
    dtype: torch.dtype = torch.bfloat16
    widths: tuple[int, int] = (8, 8)  # of keys and of values

    def __str__(self) -> str:
        return f"{'hnd' if self.hnd else 'nhd'}-{self.page_size}-{str(self.dtype)[6:]}-{self.widths}"


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


def make_levels(levels: Levels, rank: int, width: int = 1) -> dict[int, Level]:
    """Make the groups of all levels, with ``width`` ranks that divide the base weights. All ranks call it."""
    places = {}
    for size in levels.sizes:
        layout, mine = RankLayout(size, size // width), levels.instance_of(rank, size)
        for instance in levels.instances(size):
            for members in layout.sp_groups():
                ranks = [instance.leader + member for member in members]
                group: Any = SimpleNamespace(device_group=dist.new_group(ranks))
                if rank in ranks:
                    topology = Topology(layout, mine.place(rank), group, None, None)  # type: ignore[arg-type]
                    places[size] = Level(mine, rank, group, topology)
    return places


def heads_of(places: Mapping[int, Level], level: int) -> list[int]:
    """The KV heads of a rank at a level. With t > 1, they are not neighbours."""
    world = max(places)
    topology, count, block = places[level].topology, world // level, KV_HEADS // world
    width = topology.layout.base_tp_size
    first, j = topology.sp_index * count, topology.layout.base_tp_index(topology.rank)
    return [(j + width * m) * block + head for m in range(first, first + count) for head in range(block)]


def tokens_of(owner: int, pages: torch.Tensor, kind: Kind) -> torch.Tensor:
    """A number for each token of some pages of an owner, all different."""
    return owner * 10_000 + token_slots(pages, kind.page_size)


def values(tokens: torch.Tensor, heads: Sequence[int], layer: int, which: int, kind: Kind) -> torch.Tensor:
    """The keys (``which`` 0) or values of tokens: ``[tokens, heads, width]``, in the bytes of the pool's type."""
    width = kind.widths[which]
    head, column = torch.tensor(heads)[:, None], torch.arange(width)
    numbers = tokens[:, None, None] * 7919 + head * 104_729 + column * 31 + layer * 1009 + which * 499
    return (numbers % 251).to(torch.uint8).float().to(kind.dtype).contiguous()


def view_of(pool: Any, layer: int, which: int) -> torch.Tensor:
    buffer: torch.Tensor = (pool.k_buffer, pool.v_buffer)[which][layer]
    return buffer


def write(level_pool: LevelPool, slots: torch.Tensor, tokens: torch.Tensor, heads: Sequence[int], kind: Kind) -> None:
    """Store tokens in slots as a step of a rank with these heads would."""
    pool = level_pool.pool
    for layer in range(LAYERS):
        for which in (0, 1):
            stored, buffer = values(tokens, heads, layer, which, kind), view_of(pool, layer, which)
            stored, buffer = stored.view(pool.store_dtype), buffer.view(pool.store_dtype)
            if pool.use_hnd:
                buffer[slots // kind.page_size, :, slots % kind.page_size] = stored
            else:
                buffer[slots] = stored


def check(level_pool: LevelPool, slots: torch.Tensor, tokens: torch.Tensor, heads: Sequence[int], kind: Kind) -> None:
    """Check that slots hold tokens, for the heads that this rank has now."""
    pool = level_pool.pool
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
