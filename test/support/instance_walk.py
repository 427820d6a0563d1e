"""Leads the instances of a world from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence

from instance_trial import World
from sglang_shift.instances.changes import Change, plan
from sglang_shift.instances.levels import Levels

# The levels of the instances, in the order of their ranks.
ALL_PAIRS = [
    (1, 1, 1, 1), (2, 1, 1), (2, 2), (4,), (2, 2), (1, 1, 2), (1, 1, 1, 1), (4,), (1, 1, 1, 1), (2, 2), (4,),
]  # fmt: skip


class Walk:
    """The instances of a world, and the changes so far."""

    def __init__(self, world: World) -> None:
        lowest = world.size // len(world.leaders)
        self.world, self.layout = world, Levels.between(lowest, world.size).instances(lowest)
        self.recomputed = self.dropped = self.changes = 0

    def go(self, levels: Sequence[int]) -> None:
        """Make the changes that lead to instances of these levels, in the order of their ranks."""
        leader = 0
        for level in levels:
            holder = next(each for each in self.layout if leader in each.ranks)
            if holder.level > level:
                self.make(Change(holder, level))
            else:
                for change in plan(self.layout, leader, level, level):
                    self.make(change)
            leader += level
        assert [each.level for each in self.layout] == list(levels)

    def make(self, change: Change) -> None:
        changed = self.world.change(change.whole.leader, change.whole.level, change.level)
        assert changed.ok, changed.reason
        self.layout = change.applied(self.layout)
        self.changes += 1
        self.recomputed += changed.tokens_recomputed
        self.dropped += changed.tokens_dropped
