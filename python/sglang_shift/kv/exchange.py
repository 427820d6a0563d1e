"""The exchange of KV pages when instances merge, and when an instance splits. Both happen in place.

At the lower level a rank has some heads of its instance's tokens. At the higher level it has fewer heads of the tokens
of all instances that merged. So a rank sends the parts of each page to the ranks that will hold them, and receives just
as much: the parts for the same bytes. The ranks go through the pages in the same ranges. A range is copied before
anything is written over it, so the memory beside the cache is bounded by the size of a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_shift.kv.layout import KvLayout

SCRATCH_BYTES = 64 << 20
"""The memory that an exchange may use beside the cache."""


@dataclass(frozen=True)
class Memory:
    """The keys or the values of one layer.

    Attributes:
        elements: All of them, as many as :meth:`sglang_shift.kv.layout.KvLayout.elements` says.
        width: The width of a head.
    """

    elements: torch.Tensor
    width: int

    def words(self) -> Memory:
        """The same bytes as the largest integers that fit. So every type can be sent, and copies take the fewest steps.

        A head must begin at a word, or its bytes could not be told from its neighbour's.
        """
        elements, width = self.elements, self.width * self.elements.itemsize
        fits = width % 8 == 0 and elements.storage_offset() * elements.itemsize % 8 == 0
        return Memory(elements.view(torch.int64), width // 8) if fits else Memory(elements.view(torch.uint8), width)


@dataclass(frozen=True)
class Volume:
    """What an exchange has moved on this rank.

    Attributes:
        sent_bytes: Bytes that this rank sent to other ranks.
        scratch_bytes: The most bytes that the exchange held beside the cache.
    """

    sent_bytes: int
    scratch_bytes: int


@dataclass(frozen=True)
class Block:
    """What this rank sends to a rank, or receives from it: one of the f parts of some pages.

    Attributes:
        peer: The rank in the group of the higher level.
        source: The instance of the lower level whose tokens these are.
        part: The index of the part in ``pages``.
        pages: ``[pages of the lower level, f, ...]``, a view of the cache.
    """

    peer: int
    source: int
    part: int
    pages: torch.Tensor


class KvExchange:
    """The exchange between two levels.

    Args:
        layout: The KV cache of a rank.
        low: The lower level.
        high: The higher level.
        group: The ranks of the instance of the higher level that have parts of the same heads. If S is P, these are all
            its ranks.
        place: This rank in the group.
        width: t, the number of such groups in an instance.
        scratch_bytes: The memory that the exchange may use beside the cache. A range has at least one page.
    """

    def __init__(
        self,
        layout: KvLayout,
        low: int,
        high: int,
        group: dist.ProcessGroup,
        place: int,
        width: int = 1,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        self.layout, self.low, self.high = layout, low, high
        self.group, self.place, self.scratch_bytes = group, place, scratch_bytes
        self.factor, self.ranks = high // low, low // width

    def merge(self, memories: Sequence[Memory], pages: Sequence[torch.Tensor]) -> Volume:
        """Turn the layout of the lower level into that of the higher one. All ranks of the group call it.

        Args:
            memories: The keys and values of all layers of this rank, in the same order on all ranks.
            pages: For each instance that merges, the pages that hold tokens, by their numbers at the lower level, on
                the CPU. They are equal on all ranks. Other pages have no defined values afterwards.

        Raises:
            ValueError: a page does not exist, or there is not one list for each instance.
        """
        return self._run(memories, pages, merges=True)

    def split(self, memories: Sequence[Memory], pages: Sequence[torch.Tensor]) -> Volume:
        """Turn the layout of the higher level into that of the lower one. All ranks of the group call it.

        Args:
            memories: As for :meth:`merge`.
            pages: For each instance of the lower level, the pages that it keeps, by their numbers at the lower level.
                :func:`sglang_shift.kv.layout.home_of` gives them.

        Raises:
            ValueError: a page does not exist, or there is not one list for each instance.
        """
        return self._run(memories, pages, merges=False)

    def _run(self, memories: Sequence[Memory], pages: Sequence[torch.Tensor], *, merges: bool) -> Volume:
        self._check(pages)
        words = [memory.words() for memory in memories]
        sent = scratch = 0
        page_bytes = max((self._page_bytes(memory) for memory in words), default=1)
        for part in self._ranges(pages, page_bytes):
            for memory in words:
                volume = self._exchange(*self._blocks(memory, merges=merges), part)
                sent += volume.sent_bytes
                scratch = max(scratch, volume.scratch_bytes)
        return Volume(sent, scratch)

    def _check(self, pages: Sequence[torch.Tensor]) -> None:
        if len(pages) != self.factor:
            raise ValueError(f"{self.factor} instances of level {self.low} merge, but there are {len(pages)} lists")
        last = self.layout.last_page(self.low)
        for each in pages:
            if len(each) and not 1 <= int(each.min()) <= int(each.max()) <= last:
                raise ValueError(f"pages {int(each.min())} to {int(each.max())} are not among pages 1 to {last}")

    def _page_bytes(self, memory: Memory) -> int:
        """Bytes of a page of the lower level."""
        tokens = self.layout.page_size * self.layout.heads_at(self.low)
        return tokens * memory.width * memory.elements.itemsize

    def _ranges(self, pages: Sequence[torch.Tensor], page_bytes: int) -> list[list[torch.Tensor]]:
        """Cut the pages into ranges that fit into the scratch memory.

        A rank sends its pages of a range, and receives at most as many bytes as all pages of the range have. So a
        range may have half of the scratch memory.

        Returns:
            For each range, the pages of each instance in it, counted from 0 without the page that holds no tokens.
        """
        size = max(1, self.scratch_bytes // (2 * page_bytes))
        counted = [each.unique() - 1 for each in pages]
        ranges = torch.cat(counted).unique().split(size)
        return [[each[(each >= part[0]) & (each <= part[-1])] for each in counted] for part in ranges if len(part)]

    def _blocks(self, memory: Memory, *, merges: bool) -> tuple[list[Block], list[Block]]:
        """What this rank sends, and what it receives.

        Ranks are numbered in the group. At the lower level, this rank is rank ``r`` of instance ``i``. Part g of its
        heads belongs to rank ``r * f + g`` of the higher level. The heads that this rank has at the higher level,
        ``place``, are a part of those that rank ``place // f`` of each instance has at the lower level.
        """
        local, merged = self.layout.parts(memory.elements, memory.width, self.low, self.high)
        i, r = divmod(self.place, self.ranks)
        factor = self.factor
        mine = [Block(r * factor + g, i, g, local) for g in range(factor)]
        all_tokens = [Block(s * self.ranks + self.place // factor, s, s, merged) for s in range(factor)]
        return (mine, all_tokens) if merges else (all_tokens, mine)

    def _exchange(self, sent: list[Block], received: list[Block], pages: list[torch.Tensor]) -> Volume:
        """Send and receive the blocks of one range of one memory."""
        outgoing = {b.peer: b.pages[pages[b.source], b.part] for b in sent if len(pages[b.source])}
        blocks = {b.peer: b for b in received if len(pages[b.source])}
        incoming = {
            peer: b.pages.new_empty((len(pages[b.source]), *b.pages.shape[2:]))
            for peer, b in blocks.items()
            if peer != self.place
        }
        operations = [
            *(dist.P2POp(dist.irecv, data, group=self.group, group_peer=peer) for peer, data in incoming.items()),
            *(
                dist.P2POp(dist.isend, data, group=self.group, group_peer=peer)
                for peer, data in outgoing.items()
                if peer != self.place
            ),
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        if self.place in blocks:
            incoming[self.place] = outgoing[self.place]
        for peer, block in blocks.items():
            block.pages[pages[block.source], block.part] = incoming[peer]
        sent_bytes = sum(data.nbytes for peer, data in outgoing.items() if peer != self.place)
        received_bytes = sum(data.nbytes for peer, data in incoming.items() if peer != self.place)
        own_bytes = outgoing[self.place].nbytes if self.place in outgoing else 0
        return Volume(sent_bytes, sent_bytes + own_bytes + received_bytes)
