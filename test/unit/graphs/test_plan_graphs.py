"""Which sizes are captured in which mode, what a step is padded to, and what its mode and prediction make of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from calibrations import measurements
from sglang_shift.args.server_args import prepare_server_args
from sglang_shift.config import ShiftConfig
from sglang_shift.cost.model import fit
from sglang_shift.errors import Refused
from sglang_shift.graphs.mode_graphs import GraphSet, PhaseGraphs
from sglang_shift.graphs.plan import GraphPlan, modes_of, padded, plan_graphs, select_sizes, warning_without_graphs
from sglang_shift.launch_server import resolve
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.builtin import TokenThreshold

LADDER = (1, 2, 4, 8, 12, 16, 24, 32)


def config(policy="calibrated", sp_size=8, **more):
    return ShiftConfig(world_size=8, sp_size=sp_size, switching=policy != "sp", policy=policy, **more)


def plan(sglang_sizes, tp, sp):
    return GraphPlan(sglang_sizes, {Mode.TP: tp, Mode.SP: sp})


def test_both_modes_where_the_size_alone_does_not_decide():
    for policy in ("calibrated", "queue-depth", "module:Class"):
        assert plan_graphs(LADDER, config(policy)) == plan(LADDER, LADDER, (8, 16, 24, 32))


def test_one_mode_where_the_policy_has_one():
    assert plan_graphs(LADDER, config("tp")) == plan(LADDER, LADDER, ())
    assert plan_graphs(LADDER, config("sp")) == plan(LADDER, (), (8, 16, 24, 32))


@pytest.mark.parametrize("threshold", [0, 1, 7, 8, 11, 12, 31, 32, 1000])
@pytest.mark.parametrize("sp_size", [1, 2, 8])
def test_a_threshold_divides_the_sizes(threshold, sp_size):
    """No size twice; and each step finds the graph of its mode, with as many rows a rank as it is padded to."""
    policy = TokenThreshold(threshold)
    made = plan_graphs(LADDER, config("tokens", sp_size, threshold=threshold))
    tp, sp = made.sizes[Mode.TP], made.sizes[Mode.SP]
    wanted_in_sp = [size for size in LADDER if size not in tp]
    assert sp == tuple(sorted({-(-size // sp_size) * sp_size for size in wanted_in_sp}))
    for tokens in range(1, 33):
        bucket = padded(tokens, made.sglang_sizes)
        if policy.choose(StepState(tokens, padded={Mode.TP: bucket})) is Mode.TP:
            assert bucket in tp
        else:
            rows = -(-bucket // sp_size)
            assert -(-padded(tokens, sp) // sp_size) <= rows and padded(tokens, sp) in sp


def test_sizes_that_fit_exactly_are_not_rounded():
    assert plan_graphs((1, 2, 3), config(sp_size=2), exact=True).sizes[Mode.SP] == (1, 2, 3)


@pytest.mark.parametrize(("most", "kept"), [(0, []), (1, [8]), (2, [1, 8]), (4, [1, 2, 4, 8]), (8, None), (99, None)])
def test_a_bound_keeps_sizes_of_one_ratio(most, kept):
    sizes = list(range(1, 9))
    assert select_sizes(sizes, most) == (sizes if kept is None else kept)


@pytest.mark.parametrize("most", range(1, 30))
def test_a_bound_leaves_no_holes_where_padding_is_limited(most):
    """Between the smallest and the largest size kept, each prefill finds a graph."""
    sizes = [
        *range(4, 33, 4),
        *range(48, 257, 16),
        *range(288, 513, 32),
        *range(640, 2049, 128),
        *range(2304, 8193, 256),
    ]
    kept = select_sizes(sizes, most, factor=2)
    assert len(kept) == len(set(kept)) <= most and kept[-1] == 8192 and set(kept) <= set(sizes)
    assert all(padded(n, kept, 2) in kept for n in range(kept[0], 8193))
    # As far down as so many reach, but for what the sizes that there are do not allow.
    assert kept[0] <= max(4, 1.3 * 8192 / 2 ** (most - 1))


def test_the_bound_is_for_sp_alone():
    assert plan_graphs(LADDER, config(graph_buckets=2)) == plan(LADDER, LADDER, (8, 32))
    assert plan_graphs(LADDER, config(graph_buckets=0)) == plan(LADDER, LADDER, ())


def test_nothing_to_capture():
    assert plan_graphs((), config()) == GraphPlan()
    assert select_sizes([], 3) == []


def test_padding():
    assert [padded(n, (4, 8)) for n in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 9]
    assert [padded(n, (4, 8, 32), factor=2) for n in (1, 2, 8, 15, 16)] == [1, 4, 8, 15, 32]
    assert padded(3, ()) == 3


def test_padding_counts_for_the_threshold():
    policy = TokenThreshold(256)
    assert policy.choose(StepState(250, padded={Mode.TP: 256})) is Mode.TP
    assert policy.choose(StepState(250, padded={Mode.TP: 264})) is Mode.SP
    assert policy.choose(StepState(300)) is Mode.SP
    assert modes_of(264, config("tokens")) == (Mode.SP,)


def settings(device="cuda", decode="full", prefill="disabled"):
    phases = {"decode": SimpleNamespace(backend=decode), "prefill": SimpleNamespace(backend=prefill)}
    return SimpleNamespace(device=device, cuda_graph_config=SimpleNamespace(**phases))


@pytest.mark.parametrize(
    ("bound", "policy", "machine", "said"),
    [
        (0, "calibrated", {}, "calibrated chooses SP for fewer of them"),
        (0, "sp", {}, "the CPU launches each kernel of every SP step"),
        (0, "tokens", {"decode": "disabled", "prefill": "breakable"}, "the CPU launches each kernel"),
        (0, "tp", {}, None),
        (0, "calibrated", {"device": "cpu"}, None),
        (0, "calibrated", {"decode": "disabled"}, None),
        (None, "calibrated", {}, None),
        (1, "calibrated", {}, None),
    ],
)
def test_what_no_graphs_in_sp_cost_is_said(bound, policy, machine, said):
    warning = warning_without_graphs(config(policy, graph_buckets=bound), settings(**machine))
    assert warning is None if said is None else said in warning


def test_each_mode_is_predicted_at_its_own_padding():
    costs = fit(measurements("crossovers-differ"))
    step = StepState(5, padded={Mode.TP: 8, Mode.SP: 16})
    for mode, tokens in ((Mode.TP, 8), (Mode.SP, 16)):
        assert costs.predict(mode, step) == costs.predict(mode, StepState(tokens))
    assert costs.predict(Mode.SP, StepState(5, padded={Mode.TP: 8})) == costs.predict(Mode.SP, StepState(5)), (
        "eager: unpadded"
    )


def test_buckets_of_a_phase():
    graphs = PhaseGraphs(plan((1, 2, 4), (1, 2, 4), (4,)))
    assert graphs.padded(3) == {Mode.TP: 4, Mode.SP: 3}, "not captured (yet)"
    graphs.sets = {Mode.TP: GraphSet((1, 2, 4)), Mode.SP: GraphSet((4,))}
    assert [tuple(graphs.padded(n).values()) for n in (1, 3, 5)] == [(1, 4), (4, 4), (5, 5)]
    graphs.factor = 1.0  # without padding
    assert [tuple(graphs.padded(n).values()) for n in (1, 3, 4)] == [(1, 1), (3, 3), (4, 4)]


def test_counts_of_a_phase():
    graphs = PhaseGraphs(plan((1, 2), (1, 2), ()))
    assert graphs.count(Mode.SP, False) is None, "nothing missed"
    assert not any(s.eager_steps for s in graphs.sets.values()), "nothing missed"
    graphs.sets[Mode.TP].sizes = (1, 2)
    assert [graphs.count(Mode.TP, True), graphs.count(Mode.SP, False)] == [True, False]
    assert graphs.report() == {
        "tp": {"sizes": [1, 2], "replayed": 1, "missed": 0},
        "sp": {"sizes": [], "replayed": 0, "missed": 1, "gib": 0.0, "seconds": 0.0},
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--shift-graph-buckets 4", "--shift-graph-buckets 4 needs --sp-size or --enable-shift-parallel"),
        ("--sp-size 2 --shift-graph-buckets -1", "--shift-graph-buckets -1 must be 0 or more"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(Refused, match=message):
        resolve(prepare_server_args(["--tp-size", "2", *flags.split()]))


def test_steps_that_must_run_in_tp_have_graphs():
    """A step with a LoRA adapter runs in TP, whatever the policy is."""
    assert plan_graphs(LADDER, config("sp"), steps_need_tp=True) == plan(LADDER, LADDER, (8, 16, 24, 32))


def test_the_width_of_a_step_counts():
    """With speculative decoding a size is a number of requests, and the threshold is one of tokens."""
    assert plan_graphs(LADDER, config("tokens", threshold=16), width=4) == plan(LADDER, (1, 2, 4), (8, 16, 24, 32))
