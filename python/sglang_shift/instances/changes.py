"""Plans the changes that bring ranks to a level: which instances merge or split, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_shift.instances.levels import Instance, Levels

Layout = tuple[Instance, ...]
"""The instances of a world, in the order of their ranks. Together they have all ranks."""


@dataclass(frozen=True)
class Change:
    """One merge of equal neighbours into an instance, or one split of an instance into equal parts.

    Attributes:
        whole: The instance after a merge or before a split.
        level: The ranks of each instance after the change.
    """

    whole: Instance
    level: int

    @property
    def merges(self) -> bool:
        """Whether instances merge; if not, one splits."""
        return self.level == self.whole.level

    @property
    def after(self) -> Layout:
        """The instances of these ranks after the change."""
        return self.whole.parts(self.level)

    def before(self, layout: Layout) -> Layout:
        """The instances of these ranks in ``layout``, which is the one before the change."""
        return tuple(each for each in layout if each.leader in self.whole.ranks)

    def applied(self, layout: Layout) -> Layout:
        """``layout`` after the change."""
        others = [each for each in layout if each.leader not in self.whole.ranks]
        return tuple(sorted([*others, *self.after], key=lambda each: each.leader))


def largest_targets(change: Change, wanted: Sequence[int]) -> tuple[int, ...]:
    """The level of the largest instance that will have ranks of each part of a split, when all changes are made.

    A part that splits further must not get a request that only a larger instance holds.

    Args:
        change: One of the changes.
        wanted: The level of each instance after the last change, in the order of their ranks; empty if ``change`` is
            the last one for these ranks.
    """
    if change.merges or not wanted:
        return ()
    starts = [sum(wanted[:i]) for i in range(len(wanted))]
    return tuple(
        max(level for first, level in zip(starts, wanted, strict=True) if first in part.ranks) for part in change.after
    )


def check_range(levels: Levels, first: int, ranks: int, level: int) -> None:
    """Check what an operator asks for.

    Args:
        levels: The levels of the world.
        first: The first rank that changes.
        ranks: The number of ranks that change.
        level: The ranks of each instance afterwards.

    Raises:
        ValueError: the world has no such level or ranks, or they form no instances of the level.
    """
    levels.check(level)
    if first < 0 or ranks < 1 or first + ranks > levels.world_size:
        raise ValueError(
            f"there are no {ranks} ranks from rank {first} on in a world of {levels.world_size}; give ranks of it"
        )
    if first % level or ranks % level:
        raise ValueError(
            f"{ranks} ranks from rank {first} on do not form instances of {level} ranks, because the first rank of an "
            f"instance is a multiple of its ranks; give multiples of {level}"
        )


def plan(layout: Layout, first: int, ranks: int, level: int) -> list[Change]:
    """The changes after which ``ranks`` ranks from ``first`` on form instances of ``level`` ranks.

    Only equal instances merge in one change. So smaller neighbours merge first.

    Raises:
        ValueError: an instance with these ranks also has others, so it would have to split outside of them.
    """
    changes: list[Change] = []
    for each in layout:
        inside = [rank in range(first, first + ranks) for rank in each.ranks]
        if any(inside) and not all(inside):
            raise ValueError(
                f"{each} has ranks outside of the {ranks} from rank {first} on; change all its ranks together"
            )
    for index in range(first // level, (first + ranks) // level):
        target = Instance(level, index)
        holder = next((each for each in layout if target.leader in each.ranks and each.level > level), None)
        if holder is None:
            changes += _merges(layout, target)
        elif target.leader == holder.leader:
            changes.append(Change(holder, level))
    return changes


def plan_layout(layout: Layout, wanted: Sequence[int]) -> list[Change]:
    """The changes after which the instances have other levels.

    Args:
        layout: The instances now.
        wanted: The level of each instance afterwards, in the order of their ranks.

    Raises:
        ValueError: the levels are not those of aligned instances, or not of all ranks.
    """
    starts = [sum(wanted[:i]) for i in range(len(wanted))]
    targets = tuple(Instance(level, first // level) for level, first in zip(wanted, starts, strict=True))
    if [each.leader for each in targets] != starts or sum(wanted) != sum(each.level for each in layout):
        raise ValueError(f"instances of {tuple(wanted)} ranks, one after the other, are not aligned or not all ranks")

    def bring(block: Instance, whole: bool) -> list[Change]:
        if block in targets:
            return [] if whole else _merges(layout, block)
        inside = targets if whole else (*targets, *layout)
        level = max(each.level for each in inside if each.leader in block.ranks and each.level < block.level)
        split = [Change(block, level)] if whole else []
        return split + [change for part in block.parts(level) for change in bring(part, whole or part in layout)]

    world = Instance(sum(wanted), 0)
    return bring(world, world in layout)


def _merges(layout: Layout, target: Instance) -> list[Change]:
    members = [each for each in layout if each.leader in target.ranks]
    if members == [target]:
        return []
    largest = max(each.level for each in members)
    changes = [change for part in target.parts(largest) for change in _merges(layout, part)]
    return [*changes, Change(target, target.level)]
