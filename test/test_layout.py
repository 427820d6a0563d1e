import pytest
from sglang_shift.layout import RankLayout

SIZES = [(p, s) for p in range(1, 17) for s in range(1, p + 1) if p % s == 0]


@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_groups_partition_the_ranks(world, sp):
    layout = RankLayout(world, sp)
    for groups, size in ((layout.sp_groups(), sp), (layout.base_tp_groups(), world // sp)):
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert all(len(group) == size for group in groups)


@pytest.mark.parametrize(("world", "sp"), SIZES)
def test_indices_are_positions_in_the_groups(world, sp):
    layout = RankLayout(world, sp)
    for group in layout.sp_groups():
        assert [layout.sp_index(rank) for rank in group] == list(range(sp))
        assert len({layout.base_tp_index(rank) for rank in group}) == 1
    for group in layout.base_tp_groups():
        assert [layout.base_tp_index(rank) for rank in group] == list(range(layout.base_tp_size))
        assert group == list(range(group[0], group[0] + len(group))), "a base-TP group must be contiguous"


@pytest.mark.parametrize(("world", "sp"), [(4, 3), (2, 4), (0, 1), (4, 0), (4, -2)])
def test_impossible_layouts_are_refused(world, sp):
    with pytest.raises(ValueError, match="must divide"):
        RankLayout(world, sp)
