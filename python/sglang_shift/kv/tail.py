"""The end of a KV cache, which has more pages of memory at some levels than at others."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sglang_shift.kv.exchange import Memory
from sglang_shift.kv.layout import KvLayout
from sglang_shift.memory.pages import Device


def with_extra(layout: KvLayout, sizes: Sequence[int], device: Device, room: Mapping[int, int]) -> KvLayout:
    """A layout that uses more pages of memory at some levels.

    Args:
        layout: The layout without them.
        sizes: The bytes of each buffer of the cache: the keys or the values of a layer.
        device: The device of the pages.
        room: How many pages of memory each level has beyond those of the buffers. All buffers get room for as many
            tokens.
    """

    def pages_for(extra: int, ratio: int) -> int:
        """The pages of memory that ``extra`` more pages of tokens take."""
        of_page = [size // layout.pages // ratio for size in sizes]
        pairs = zip(sizes, of_page, strict=True)
        return sum(device.pages(size + extra * page) - device.pages(size) for size, page in pairs)

    extra = {}
    for level, pages in room.items():
        ratio = layout.ratio(level)
        most = (pages + len(sizes)) * device.page_bytes * layout.pages * ratio // sum(sizes)
        extra[level] = bisect_right(range(most + 1), pages, key=lambda count: pages_for(count, ratio)) - 1
    return replace(layout, extra=extra)


class KvTail:
    """The buffers of a KV cache on pages of memory.

    Args:
        device: The device of the pages. It must have as many in stock as the buffers need at the lowest level.
        layout: The layout with its extra pages.
        widths: The width of a head in each buffer.
        dtype: The type of the elements.

    Attributes:
        memories: The buffers, with addresses for all that any level has.
    """

    def __init__(self, device: Device, layout: KvLayout, widths: Sequence[int], dtype: torch.dtype) -> None:
        self.layout, self.widths, self.itemsize = layout, widths, dtype.itemsize
        self._ranges = [device.reserve(layout.elements(width) * dtype.itemsize) for width in widths]
        self.memories = [
            Memory(each.tensor((layout.elements(width),), dtype), width)
            for each, width in zip(self._ranges, widths, strict=True)
        ]
        self.enter(layout.lowest)

    def enter(self, level: int) -> None:
        """Map what this level has, and unmap the rest. Nothing may use the rest any more.

        Raises:
            MemoryError: the stock of the device has too few pages.
        """
        for each, width in zip(self._ranges, self.widths, strict=True):
            wanted, mapped = each.device.pages(self.layout.elements(width, level) * self.itemsize), len(each.mapped)
            each.unmap(range(wanted, mapped))
            each.map(range(mapped, wanted))
