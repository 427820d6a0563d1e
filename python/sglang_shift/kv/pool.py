"""SGLang's KV pool and its allocator at each level. The memory is allocated once; a level changes views and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_shift.errors import InstanceRefused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.exchange import SCRATCH_BYTES, KvExchange, Memory, Volume
from sglang_shift.kv.layout import KvLayout
from sglang_shift.kv.tail import KvTail, with_extra
from sglang_shift.memory.pages import Device
from sglang_shift.parallel.level import Level
from sglang_shift.seams import relies_on

COPY_PAGES = 1024
"""Pages that are copied together. The copy needs their memory once more."""


@relies_on(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.__init__",
    "This method sets all attributes of a pool that depend on the number of heads and slots.",
)
@relies_on(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._create_buffers_normal",
    "This method makes the keys and the values of a layer contiguous, each with a page that holds no tokens.",
)
@relies_on(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._kv_buffer_shapes",
    "This method says how keys and values are laid out.",
)
class LevelPool:
    """A KV pool that SGLang has built for all ranks of the world, at the levels of the world.

    Args:
        pool: The pool. It must be at the highest level.
        allocator: Its allocator.
        levels: The levels of the world.
        kv_heads: KV heads of a layer, of the whole model.

    Attributes:
        layout: The layout of the cache.
        level: The level of the pool now.

    Raises:
        InstanceRefused: the pool, the allocator or the number of heads is of a kind that instances cannot share.
    """

    layout: KvLayout
    level: int

    def __init__(self, pool: Any, allocator: Any, levels: Levels, kv_heads: int) -> None:
        self.pool, self.allocator = pool, allocator
        self.level = levels.world_size
        ratio = levels.world_size // levels.lowest
        _check_kind(pool, allocator)
        if pool.head_num * levels.world_size != kv_heads:
            raise InstanceRefused(
                f"instances need at least one KV head of its own for each of the {levels.world_size} ranks, but the "
                f"model has {kv_heads} KV heads; use at most {kv_heads} ranks"
            )
        pages, rest = divmod((pool.size + pool.page_size) // pool.page_size, ratio)
        if rest:
            raise InstanceRefused(
                f"the KV cache has {pool.size} tokens, which the {ratio} instances of a split cannot divide into pages "
                f"of {pool.page_size}; give it {pages * ratio * pool.page_size - pool.page_size} tokens "
                f"(--max-total-tokens)"
            )
        self.layout = KvLayout(levels.lowest, pages, pool.head_num * ratio, pool.page_size, pool.use_hnd)
        self._keys = [_memory(buffer) for buffer in pool.k_buffer]
        self._values = [_memory(buffer) for buffer in pool.v_buffer]

    def move(self, device: Device, room: Mapping[int, int]) -> KvTail:
        """Move the cache to pages of memory, so that it can grow at its end. Its tokens are lost.

        Args:
            device: Where the pages come from.
            room: How many pages each level has beyond those of the lowest.

        Returns:
            What maps the pages. Whoever changes the level must call it.
        """
        sizes = [memory.elements.nbytes for memory in self.memories]
        widths = [memory.width for memory in self.memories]
        self.layout = with_extra(self.layout, sizes, device, room)
        device.take(sum(map(device.pages, sizes)))
        tail = KvTail(device, self.layout, widths, self.memories[0].elements.dtype)
        self._keys, self._values = tail.memories[: len(self._keys)], tail.memories[len(self._keys) :]
        self.enter(self.level)
        return tail

    @property
    def memories(self) -> list[Memory]:
        """The keys and the values of all layers."""
        return [*self._keys, *self._values]

    @property
    def size(self) -> int:
        """How many tokens the instance of this rank can hold."""
        return self.layout.tokens(self.level)

    def merge(self, level: Level, pages: list[torch.Tensor], scratch_bytes: int = SCRATCH_BYTES) -> Volume:
        """Move the cache to a higher level. All ranks of the instance of that level call it between two steps.

        Args:
            level: The place of this rank at the higher level.
            pages: For each instance that merges, the pages that hold tokens, by their numbers now. Equal on all ranks.
            scratch_bytes: The memory that the exchange may use beside the cache.

        Returns:
            What was moved. All pages are free: call :meth:`keep` with those that are not.
        """
        volume = self._exchange(level, self.level, scratch_bytes).merge(self.memories, pages)
        self.enter(level.size)
        return volume

    def split(self, level: Level, low: int, pages: list[torch.Tensor], scratch_bytes: int = SCRATCH_BYTES) -> Volume:
        """Move the cache to a lower level. All ranks of the instance call it between two steps.

        Args:
            level: The place of this rank in the instance that splits.
            low: The lower level.
            pages: For each part, the pages that it keeps, by their numbers at the lower level. Equal on all ranks.
            scratch_bytes: The memory that the exchange may use beside the cache.

        Returns:
            What was moved. All pages are free: call :meth:`keep` with those that are not.
        """
        volume = self._exchange(level, low, scratch_bytes).split(self.memories, pages)
        self.enter(low)
        return volume

    def _exchange(self, high: Level, low: int, scratch_bytes: int) -> KvExchange:
        """The exchange between the instance of a higher level and those of a lower one."""
        topology = high.topology
        return KvExchange(
            self.layout, low, high.size, topology.sp_group.device_group, topology.sp_index,
            topology.layout.base_tp_size, scratch_bytes,
        )  # fmt: skip

    def copy(self, moves: list[tuple[int, int]]) -> None:
        """Copy pages of this rank to other pages of it.

        Args:
            moves: The number of each page, and of the page that gets its tokens. No page of the first kind is one of
                the second kind, so the order does not matter.
        """
        if not moves:
            return
        page_size = 1 if self.pool.use_hnd else self.layout.page_size
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            pages = buffer.unflatten(0, (-1, page_size))
            for part in torch.tensor(moves, dtype=torch.int64).view(-1, 2).split(COPY_PAGES):
                source, target = part.to(buffer.device).unbind(1)
                pages[target] = pages[source]

    def enter(self, level: int) -> None:
        """Give the pool and the allocator the shapes and sizes of a level. All pages are free afterwards.

        The values of the pages stay where they are. Only an exchange gives them a meaning at another level.
        """
        pool, layout = self.pool, self.layout
        pool.k_buffer = [layout.view(keys.elements, keys.width, level) for keys in self._keys]
        pool.v_buffer = [layout.view(values.elements, values.width, level) for values in self._values]
        pool.head_num = layout.heads_at(level)
        pool.row_dim, pool.v_row_dim = pool.head_num * pool.head_dim, pool.head_num * pool.v_head_dim
        pool.size = layout.tokens(level)
        if pool.use_hnd:
            pool.num_pages = layout.last_page(level) + 1
        pool._init_data_ptrs_and_strides()
        pool._kv_buffer_descs = pool._build_kv_buffer_descs()
        self.level = level
        self.keep(torch.empty(0, dtype=torch.int64))

    @relies_on(
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator.resize",
        "This method sets the size of an allocator, and frees all its pages.",
    )
    @relies_on(
        "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.clear",
        "This method makes the list of free slots from the size.",
    )
    @relies_on(
        "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.clear",
        "This method makes the list of free pages from the number of pages.",
    )
    def keep(self, pages: torch.Tensor) -> None:
        """Let the allocator count these pages as taken, and all others of the level as free.

        Args:
            pages: Numbers of pages at the level of the pool now.
        """
        self.allocator.resize(SimpleNamespace(max_total_num_tokens=self.size))
        free = self.allocator.free_pages
        self.allocator.free_pages = free[~torch.isin(free, pages.to(free.device))]


def _memory(buffer: torch.Tensor) -> Memory:
    return Memory(buffer.view(-1), buffer.shape[-1])


def _check_kind(pool: Any, allocator: Any) -> None:
    """Refuse pools whose pages are not simply keys and values of heads."""
    if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout not in ("nhd", "hnd"):
        raise InstanceRefused(
            f"instances cannot share a KV cache of the kind {type(pool).__name__} ({_layout_of(pool)}); they need full "
            f"attention with keys and values of each head"
        )
    if pool.is_quantized_kv_cache:
        raise InstanceRefused("instances cannot share a KV cache with scales of its own; leave out --kv-cache-dtype")
    if pool.post_capture_active or pool._kv_copy_config is not None:
        raise InstanceRefused("instances cannot share a KV cache whose memory SGLang allocates or copies by address")
    if type(allocator) not in (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator):
        raise InstanceRefused(f"instances cannot share a KV cache with the allocator {type(allocator).__name__}")


def _layout_of(pool: Any) -> str:
    return str(getattr(pool, "kv_cache_layout", "no layout of heads"))
