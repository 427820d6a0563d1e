"""A rank's place at a level: the values in SGLang's parallel context, and what instances refuse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from sglang.srt.runtime_context import get_parallel, reset_context
from sglang_shift.errors import Refused
from sglang_shift.instances.levels import Levels
from sglang_shift.parallel import level
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.level import OTHER_SIZES, Level, build_levels
from sglang_shift.parallel.topology import Topology


def group(ranks: list[int], rank: int) -> SimpleNamespace:
    return SimpleNamespace(ranks=ranks, world_size=len(ranks), rank_in_group=ranks.index(rank))


def topology(world: int, sp_size: int, rank: int) -> Topology:
    everyone = group(list(range(world)), rank)
    return Topology(RankLayout(world, sp_size), rank, everyone, None, None)  # type: ignore[arg-type]


@pytest.fixture
def parallel(monkeypatch):
    """SGLang's parallel context of rank 5 of 8, and no collectives."""
    reset_context()
    everyone = group(list(range(8)), 5)
    whole = Level(Levels.between(1, 8).instance_of(5, 8), 5, everyone, topology(8, 8, 5))  # type: ignore[arg-type]
    get_parallel().override_permanently(**whole.values, **dict.fromkeys(OTHER_SIZES, 1))
    made = []

    def new_group(groups, world, name, fast_all_reduce):
        made.append((name, groups))
        return group(next(ranks for ranks in groups if 5 in ranks), 5)

    monkeypatch.setattr(level, "new_group", new_group)
    yield SimpleNamespace(context=get_parallel(), world=everyone, made=made)
    reset_context()


def test_each_level_has_its_groups(parallel):
    whole = topology(8, 8, 5)
    places = build_levels(Levels.between(1, 8), whole)
    assert list(places) == [1, 2, 4, 8]
    assert [(name, len(groups)) for name, groups in parallel.made] == [
        ("shift_level_1", 8), ("shift_level_2", 4), ("shift_level_4", 2),
    ]  # fmt: skip
    assert [(p.place, p.leads, p.group.ranks[0]) for p in places.values()] == [
        (0, True, 5), (1, False, 4), (1, False, 4), (5, False, 0),
    ]  # fmt: skip
    assert places[8].group is parallel.world and places[8].topology is whole
    assert places[1].topology.layout == RankLayout(1, 1) and places[1].topology.rank == 0
    assert [places[size].has_sp for size in (1, 2, 4, 8)] == [False, True, True, True]
    assert places[2].topology.layout == RankLayout(2, 2) and places[2].topology.rank == 1


def test_ranks_that_divide_the_weights_stay_together(parallel):
    whole = replace(topology(8, 4, 5), base_tp_group=group([4, 5], 5))
    places = build_levels(Levels.between(2, 8), whole)
    assert parallel.made == [
        ("shift_level_2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("shift_sp_2", [[0], [1], [2], [3], [4], [5], [6], [7]]),
        ("shift_level_4", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("shift_sp_4", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ]
    assert [places[size].topology.layout for size in (2, 4, 8)] == [
        RankLayout(2, 1),
        RankLayout(4, 2),
        RankLayout(8, 4),
    ]
    assert [places[size].has_sp for size in (2, 4, 8)] == [False, True, True]
    assert places[4].topology.sp_index == 0 and places[4].topology.sp_group.ranks == [5, 7]
    assert {id(place.topology.base_tp_group) for place in places.values()} == {id(whole.base_tp_group)}


def test_a_level_replaces_the_values_that_sglang_reads(parallel):
    places = build_levels(Levels.between(1, 8), topology(8, 8, 5))
    context = parallel.context
    with places[2].scope():
        assert (context.tp_size, context.attn_tp_rank, context.moe_tp_group) == (2, 1, places[2].group)
    assert (context.tp_size, context.tp_rank) == (8, 5)
    for size in (1, 4, 8):
        places[size].enter()
        assert (context.tp_size, context.attn_tp_size, context.moe_tp_size) == (size,) * 3
        assert context.tp_rank == 5 % size and context.tp_group is places[size].group


def test_only_tensor_parallelism_with_whole_weights(parallel):
    with pytest.raises(
        Refused, match=r"with --sp-size 2, 4 ranks hold the weights together, but an instance of 2 must"
    ):
        build_levels(Levels.between(2, 8), topology(8, 2, 5))
    with pytest.raises(ValueError, match="the levels are those of 4 ranks, but SGLang has 8"):
        build_levels(Levels.between(1, 4), topology(4, 4, 3))
    for name in OTHER_SIZES:
        stub = SimpleNamespace(tp_group=parallel.world, **dict.fromkeys(OTHER_SIZES, 1) | {name: 2})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(level, "get_parallel", lambda stub=stub: stub)
            with pytest.raises(Refused, match=f"but {name} is 2; set it to 1"):
                build_levels(Levels.between(1, 8), topology(8, 8, 5))
