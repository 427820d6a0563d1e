"""Changes: which instances merge and split until ranks are at a level."""

from __future__ import annotations

import pytest
from sglang_shift.instances.changes import Change, check_range, largest_targets, plan, plan_layout
from sglang_shift.instances.levels import Instance, Levels

LEVELS = Levels((1, 2, 4, 8))


def layout(*levels: int) -> tuple[Instance, ...]:
    """Instances of these levels, one after the other."""
    starts = [sum(levels[:i]) for i in range(len(levels))]
    return tuple(Instance(level, first // level) for level, first in zip(levels, starts, strict=True))


def after(before: tuple[Instance, ...], changes: list[Change]) -> tuple[int, ...]:
    """The levels after changes, each of which must be possible when it is made."""
    for change in changes:
        members = change.before(before)
        assert {each.level for each in members} == ({change.whole.level} if not change.merges else {members[0].level})
        assert sum(each.level for each in members) == change.whole.level
        before = change.applied(before)
    return tuple(each.level for each in before)


@pytest.mark.parametrize(
    ("levels", "first", "ranks", "level", "expected"),
    [
        ((1, 1, 1, 1), 0, 4, 4, (4,)),
        ((1, 1, 1, 1), 0, 4, 2, (2, 2)),
        ((1, 1, 1, 1), 2, 2, 2, (1, 1, 2)),
        ((2, 1, 1), 0, 4, 4, (4,)),
        ((2, 1, 1, 4), 0, 8, 8, (8,)),
        ((4, 1, 1, 1, 1), 0, 8, 2, (2, 2, 2, 2)),
        ((8,), 0, 8, 1, (1,) * 8),
        ((4, 4), 4, 4, 1, (4, 1, 1, 1, 1)),
        ((2, 2), 0, 4, 2, (2, 2)),
    ],
)
def test_the_layout_after_the_changes(levels, first, ranks, level, expected):
    before = layout(*levels)
    assert after(before, plan(before, first, ranks, level)) == expected


def test_unequal_instances_merge_one_after_the_other():
    changes = plan(layout(2, 1, 1), 0, 4, 4)
    assert changes == [Change(Instance(2, 1), 2), Change(Instance(4, 0), 4)]


def test_an_instance_with_ranks_outside_does_not_split_by_the_way():
    with pytest.raises(ValueError, match="ranks 0 to 3 has ranks outside of the 2 from rank 0 on"):
        plan(layout(4, 4), 0, 2, 1)


@pytest.mark.parametrize(
    ("first", "ranks", "level", "why"),
    [
        (0, 8, 3, "level 3 is not one of the levels"),
        (4, 8, 2, "there are no 8 ranks from rank 4"),
        (-2, 2, 2, "there are no 2 ranks"),
        (0, 0, 2, "there are no 0 ranks"),
        (2, 4, 4, "4 ranks from rank 2 on do not form instances of 4"),
        (0, 6, 4, "give multiples of 4"),
    ],
)
def test_what_an_operator_cannot_ask_for(first, ranks, level, why):
    with pytest.raises(ValueError, match=why):
        check_range(LEVELS, first, ranks, level)


@pytest.mark.parametrize("levels", [(1, 1, 1, 1), (4,), (2, 2), (2, 1, 1), (1, 1, 2)])
@pytest.mark.parametrize("wanted", [(1, 1, 1, 1), (4,), (2, 2), (2, 1, 1), (1, 1, 2)])
def test_every_layout_leads_to_every_other(levels, wanted):
    before = layout(*levels)
    changes = plan_layout(before, wanted)
    assert after(before, changes) == wanted
    assert (not changes) == (levels == wanted)


@pytest.mark.parametrize("wanted", [(1, 2, 1), (2,), (4, 4)])
def test_layouts_that_there_are_not(wanted):
    with pytest.raises(ValueError, match="are not aligned or not all ranks"):
        plan_layout(layout(2, 2), wanted)


@pytest.mark.parametrize(
    ("before", "wanted", "targets"),
    [
        ((8,), (4, 1, 1, 1, 1), [(4, 1), (1, 1, 1, 1)]),
        ((8,), (1, 1, 2, 4), [(2, 4), (1, 2), (1, 1)]),
        ((4, 4), (8,), [()]),
        ((1,) * 8, (1, 1, 2, 1, 1, 2), [(), ()]),
    ],
)
def test_the_largest_instance_of_each_part_after_all_changes(before, wanted, targets):
    changes = plan_layout(layout(*before), wanted)
    assert [largest_targets(change, wanted) for change in changes] == targets
    assert all(largest_targets(change, ()) == () for change in changes)
