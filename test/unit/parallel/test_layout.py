import inspect
from types import SimpleNamespace

import pytest
from sglang_shift.parallel import topology
from sglang_shift.parallel.layout import RankLayout

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


def test_groups_of_the_base_configuration(monkeypatch):
    """Nobody all-reduces over an SP group; a base-TP group has what SGLang's flags give."""
    real, built = topology.init_model_parallel_group, {}

    def init(*args, **kwargs):
        given = inspect.signature(real).bind(*args, **kwargs).arguments
        built[given["group_name"]] = given
        return SimpleNamespace(world_size=2)

    tp_group = SimpleNamespace(rank_in_group=1, ranks=[4, 5, 6, 7], device_group=None)
    monkeypatch.setattr(topology, "get_parallel", lambda: SimpleNamespace(tp_group=tp_group))
    monkeypatch.setattr(topology, "get_device", lambda: SimpleNamespace(gpu_id=1))
    monkeypatch.setattr(topology.torch.distributed, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(topology, "init_model_parallel_group", init)
    groups = topology.build_topology(RankLayout(4, 2))
    assert (groups.rank, groups.sp_index, groups.adds_row_bias) == (1, 0, False)
    communicators = ("use_custom_allreduce", "use_mscclpp", "use_torch_symm_mem_allreduce")
    assert {name: [given[c] for c in communicators] for name, given in built.items()} == {
        "shift_sp": [False] * 3,
        "shift_base_tp": [None] * 3,
    }
    assert built["shift_sp"]["group_ranks"] == [[4, 6], [5, 7]]
    assert built["shift_base_tp"]["group_ranks"] == [[4, 5], [6, 7]]
