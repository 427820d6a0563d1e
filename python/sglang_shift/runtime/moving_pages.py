"""Pages that move between the FFN weights and the KV cache of a rank when the level of its instance changes.

At the lowest level a rank has all weights. In a merged instance it keeps only its own TP shard of each FFN, so all
steps run in TP. The memory of the other shards goes to the KV cache. Before a split, the cache gives it back, and the
ranks of the instance send each other the shards. The number of pages never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_shift.errors import InstanceRefused
from sglang_shift.instances.levels import Levels
from sglang_shift.kv.pool import LevelPool
from sglang_shift.memory.host import HostDevice
from sglang_shift.memory.pages import Device
from sglang_shift.parallel.level import Level
from sglang_shift.weights.base_weights import BaseWeight
from sglang_shift.weights.ffn_pages import FfnPages, Holding
from sglang_shift.weights.level_weights import Blocks

MIB = 1 << 20


def device_of(device: torch.device | str) -> Device:
    """The pages of the device that a rank runs on.

    Raises:
        InstanceRefused: no pages of this device were ever tested.
    """
    if torch.device(device).type != "cpu":
        raise InstanceRefused(f"--merge-weights free was never run on the device {device}, only on CPUs; leave it out")
    return HostDevice()


class MovingPages:
    """The pages of a rank that its FFN weights and its KV cache share.

    Args:
        device: Where the pages come from.
        bases: The base weights of the FFNs. They move to the pages, so no other view of them may exist yet.
        pool: The KV cache, without tokens. It moves to the pages.
        places: This rank's place at each level.
        levels: The levels of the world.

    Attributes:
        level: The level for which the pages are mapped.
        room: The pages that a merge to each level frees.
        gained: The tokens that an instance of each level holds more.

    Raises:
        InstanceRefused: the model has no weights that a merge could free.
    """

    def __init__(
        self,
        device: Device,
        bases: Sequence[BaseWeight],
        pool: LevelPool,
        places: dict[int, Level],
        levels: Levels,
    ) -> None:
        if not bases:
            raise InstanceRefused("the model has no FFNs that ranks divide, so --merge-weights free would free nothing")
        self.device, self.places, self.levels = device, places, levels
        self.level = levels.lowest
        layout = places[levels.world_size].topology.layout
        self.total, self.width = layout.sp_size, layout.base_tp_size
        self.rank = places[levels.lowest].rank
        self.weights = FfnPages(device, bases, self.total)
        self.room = {level: self._room(level) for level in levels.sizes[1:]}
        device.take(self._spare())
        tokens = {level: pool.layout.tokens(level) for level in levels.sizes}
        self.tail = pool.move(device, self.room)
        self.gained = {level: pool.layout.tokens(level) - tokens[level] for level in levels.sizes}

    def enter(self, level: int) -> int:
        """Move the pages for another level. All ranks of the instance call it, between two steps.

        What the KV cache has beyond the level must not be in use.

        Returns:
            The bytes of weights that this rank has sent.
        """
        low = min(level, self.level)
        self.tail.enter(low)
        group = self.places[self.level].topology.sp_group.device_group
        sent = self.weights.move(self._holding(self.level), self._holding(level), group)
        self.tail.enter(level)
        self.level = level
        return sent

    def text(self) -> str:
        """How much merges free, for the log."""
        size, weights = self.device.page_bytes, self.weights
        parts = [
            f"{weights.nbytes / MIB:.0f} MiB of FFN weights are on pages of {size / MIB:g} MiB, and to pad all shards "
            f"to whole pages would take {weights.padding_bytes / MIB:.0f} MiB more"
        ]
        for level, pages in self.room.items():
            others = weights.nbytes - weights.nbytes // (level // self.width)
            parts.append(
                f"a merge to {level} ranks frees {pages * size / MIB:.0f} MiB on each rank, "
                f"{100 * pages * size / others:.1f} % of the other ranks' shards, for {self.gained[level]} more tokens"
            )
        return "; ".join(parts)

    def _blocks(self, rank: int, level: int) -> Blocks:
        """The blocks of each FFN that a rank holds at a level."""
        if level == self.levels.lowest:
            return Blocks(self.total, 0, self.total)
        ranks = level // self.width
        return Blocks.of(self.total, ranks, rank // self.width % ranks)

    def _holding(self, level: int) -> Holding:
        """What the ranks that share blocks with this one, in the instance that it is a part of now, hold at a level."""
        place = self.places[self.level]
        ranks = place.instance.ranks[self.rank % self.width :: self.width]
        return Holding([self._blocks(rank, level) for rank in ranks], place.topology.sp_index)

    def _room(self, level: int) -> int:
        """How many pages each rank of an instance can free at least."""
        return min(self.weights.free_pages(self._blocks(rank, level)) for rank in range(level))

    def _spare(self) -> int:
        """The pages that a rank needs beside those of its weights and its cache, to change between merged levels."""
        merged = self.levels.sizes[1:]
        peaks = [
            self.room[min(a, b)] + self.weights.peak_pages(self._blocks(self.rank, a), self._blocks(self.rank, b))
            for a in merged
            for b in merged
        ]
        return max(0, max(peaks) - self.weights.pages)
