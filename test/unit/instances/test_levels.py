"""Which ranks form an instance at each level, who leads it, and with whom it merges."""

from __future__ import annotations

import pytest
from sglang_shift.instances.levels import Instance, Levels

WORLDS = [(1, 1), (1, 2), (1, 4), (2, 8), (1, 16)]  # the lowest level, and the number of ranks


@pytest.mark.parametrize(("lowest", "world"), WORLDS)
def test_the_instances_of_a_level_have_every_rank_once(lowest, world):
    levels = Levels.between(lowest, world)
    assert levels.lowest == lowest and levels.world_size == world
    for level in levels.sizes:
        instances = levels.instances(level)
        assert [rank for instance in instances for rank in instance.ranks] == list(range(world))
        assert all(len(instance.ranks) == level for instance in instances)


@pytest.mark.parametrize(("lowest", "world"), WORLDS)
def test_merging_and_splitting_are_inverse(lowest, world):
    levels = Levels.between(lowest, world)
    for low in levels.sizes:
        for high in levels.sizes:
            for rank in range(world) if low <= high else ():
                small, large = levels.instance_of(rank, low), levels.instance_of(rank, high)
                assert small.merged(high) == large and small in large.parts(low)
                assert [r for part in large.parts(low) for r in part.ranks] == list(large.ranks)
                assert set(small.neighbours(high)) | {small} == set(large.parts(low))


def test_a_rank_in_its_instance():
    levels = Levels.between(1, 8)
    assert levels.sizes == (1, 2, 4, 8)
    pair = levels.instance_of(5, 2)
    assert pair == Instance(2, 2) and list(pair.ranks) == [4, 5]
    assert pair.leader == 4 and pair.place(5) == 1
    assert pair.neighbours(4) == (Instance(2, 3),)
    assert pair.neighbours(8) == (Instance(2, 0), Instance(2, 1), Instance(2, 3))
    assert Instance(1, 5).parts(1) == (Instance(1, 5),) and Instance(1, 5).neighbours(1) == ()


def test_levels_may_leave_some_out():
    levels = Levels((1, 8))
    assert levels.instances(8) == (Instance(8, 0),) and len(levels.instances(1)) == 8
    with pytest.raises(ValueError, match=r"level 2 is not one of the levels of this world, which are \(1, 8\)"):
        levels.instance_of(0, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels(()), "at least one of them"),
        (lambda: Levels((2, 1)), "ascending order"),
        (lambda: Levels((1, 1)), "ascending order"),
        (lambda: Levels((1, 6)), "a level is 6, but it must be a power of two"),
        (lambda: Levels.between(1, 6), "the number of ranks is 6, but it must be a power of two"),
        (lambda: Levels.between(3, 8), "the lowest level is 3"),
        (lambda: Levels.between(8, 4), "an instance of 8 ranks needs more ranks than the 4 of the world"),
        (lambda: Levels.between(1, 4).instance_of(4, 2), "there is no rank 4 in a world of 4"),
        (lambda: Instance(0, 0), "a level is 0"),
        (lambda: Instance(1, -1), "the index of an instance is -1"),
        (lambda: Instance(2, 1).place(1), "rank 1 is not in the instance of ranks 2 to 3"),
        (lambda: Instance(4, 0).merged(2), "the instance of ranks 0 to 3 cannot merge .* level 2, which is lower"),
        (lambda: Instance(2, 0).parts(4), "the instance of ranks 0 to 1 cannot split .* level 4, which is higher"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ((8, 8), (1, 2, 4, 8)),
        ((8, 2), (4, 8)),
        ((8, 8, "2"), (1, 2, 8)),
        ((8, 4, "8"), (2, 8)),
        ((8, 4, "4,2"), (2, 4, 8)),
    ],
)
def test_levels_of_the_flags(flags, sizes):
    assert Levels.of_flags(*flags).sizes == sizes


@pytest.mark.parametrize("text", ["3", "1", "16", "two", "2,,4"])
def test_levels_that_the_flags_cannot_have(text):
    with pytest.raises(ValueError, match="is not"):
        Levels.of_flags(8, 4, text)
