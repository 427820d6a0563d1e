"""The weights of FFNs on pages of memory, so that a rank can give away the shards of other ranks and get them back.

A weight is stored block after block: the rows of a column-parallel weight, and the columns of a row-parallel one. The
edges of blocks are not edges of pages. So a page with bytes of two blocks stays as long as one of them is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sglang_shift.memory.pages import Device, Reservation
from sglang_shift.weights.base_weights import BaseWeight
from sglang_shift.weights.level_weights import Blocks


@dataclass(frozen=True)
class Holding:
    """The blocks that each rank of an instance holds.

    Attributes:
        blocks: The blocks of each rank, in the order of the ranks.
        place: This rank's number among them.
    """

    blocks: Sequence[Blocks]
    place: int

    @property
    def mine(self) -> Blocks:
        """The blocks of this rank."""
        return self.blocks[self.place]


def pages_of(blocks: Blocks, block_bytes: int, page_bytes: int) -> range:
    """The pages of a weight that have bytes of these blocks. The weight begins with a page."""
    begin, end = blocks.first * block_bytes, (blocks.first + blocks.count) * block_bytes
    return range(begin // page_bytes, -(-end // page_bytes))


class PagedWeight:
    """A base weight on pages.

    Args:
        device: Where the pages come from. It must have as many in stock as the weight needs.
        base: The base weight. Its values move to the pages.
        total: P, the number of blocks.
    """

    def __init__(self, device: Device, base: BaseWeight, total: int) -> None:
        self.base, self.total = base, total
        by_rows = base.weight if base.shard_dim == 0 else base.weight.t()
        self.reservation: Reservation = device.reserve(by_rows.nbytes)
        self.reservation.map(range(self.reservation.count))
        self.rows = self.reservation.tensor(by_rows.shape, by_rows.dtype)
        self.block_bytes = by_rows.nbytes // total
        base.move(self.rows if base.shard_dim == 0 else self.rows.t())

    def places(self, blocks: Blocks) -> range:
        """The pages that have bytes of these blocks."""
        return pages_of(blocks, self.block_bytes, self.reservation.device.page_bytes)

    def of_blocks(self, blocks: Blocks) -> torch.Tensor:
        """The rows of these blocks."""
        return blocks.of_tensor(self.rows, 0)

    def hold(self, blocks: Blocks) -> None:
        """Map the pages of these blocks that are not mapped."""
        self.reservation.map(place for place in self.places(blocks) if place not in self.reservation.mapped)

    def drop(self, blocks: Blocks) -> None:
        """Unmap all pages but those of these blocks."""
        kept = self.places(blocks)
        self.reservation.unmap([place for place in self.reservation.mapped if place not in kept])
        self.base.complete = blocks.count == blocks.total


class FfnPages:
    """The weights of all FFNs of a rank.

    Args:
        device: Where the pages come from.
        bases: The base weights. One after the other moves to the pages.
        total: P, the number of blocks of a base weight.
    """

    def __init__(self, device: Device, bases: Sequence[BaseWeight], total: int) -> None:
        self.device, self.total = device, total
        self.weights: list[PagedWeight] = []
        for base in bases:
            device.take(device.pages(base.weight.nbytes))
            self.weights.append(PagedWeight(device, base, total))

    @property
    def nbytes(self) -> int:
        """The bytes of all weights, freed or not."""
        return sum(weight.rows.nbytes for weight in self.weights)

    @property
    def padding_bytes(self) -> int:
        """The bytes that these weights would take more if each block were padded to whole pages, as in the paper."""
        padded = [self.total * self.device.pages(w.block_bytes) for w in self.weights]
        return sum(padded) * self.device.page_bytes - self.nbytes

    @property
    def pages(self) -> int:
        """The pages of all weights, freed or not."""
        return sum(weight.reservation.count for weight in self.weights)

    def free_pages(self, blocks: Blocks) -> int:
        """How many pages this rank can give away if this rank holds only these blocks."""
        return sum(weight.reservation.count - len(weight.places(blocks)) for weight in self.weights)

    def peak_pages(self, before: Blocks, after: Blocks) -> int:
        """The most pages that these weights have at one time while :meth:`move` changes from blocks to others."""
        pages = [(set(weight.places(before)), set(weight.places(after))) for weight in self.weights]
        now = peak = sum(len(held) for held, _ in pages)
        for held, wanted in pages:
            peak = max(peak, now + len(wanted - held))
            now += len(wanted) - len(held)
        return peak

    def move(self, before: Holding, after: Holding, group: dist.ProcessGroup) -> int:
        """Hold other blocks. What this rank does not have comes from its peers. All ranks of ``before`` call it.

        Args:
            before: What the ranks of the instance hold now. Together they have all blocks.
            after: What the same ranks hold afterwards.
            group: Their group.

        Returns:
            The bytes that this rank has sent.
        """
        sent = 0
        for weight in self.weights:
            weight.hold(after.mine)
            sent += _exchange(weight, before, after, group)
            weight.drop(after.mine)
        return sent


def _exchange(weight: PagedWeight, before: Holding, after: Holding, group: dist.ProcessGroup) -> int:
    """Send and receive the blocks of a weight. They are sent from its memory, and received into it."""
    me, operations, sent = before.place, [], 0
    for peer in range(len(before.blocks)):
        if peer == me:
            continue
        if run := _missing(before.blocks[peer], after.mine, before.mine):
            operations.append(dist.P2POp(dist.irecv, weight.of_blocks(run), group=group, group_peer=peer))
        if run := _missing(before.mine, after.blocks[peer], before.blocks[peer]):
            rows = weight.of_blocks(run)
            operations.append(dist.P2POp(dist.isend, rows, group=group, group_peer=peer))
            sent += rows.nbytes
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return sent


def _missing(held: Blocks, wanted: Blocks, own: Blocks) -> Blocks | None:
    """The blocks that a rank wants, another one holds, and it does not have. Ranks hold the same blocks, or others."""
    first, end = max(held.first, wanted.first), min(held.first + held.count, wanted.first + wanted.count)
    return None if own == held or end <= first else Blocks(held.total, first, end - first)
