"""Policies for instances: predictions of layouts, routes, merges and splits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sglang_shift.cost.deployment import Deployment, InstancePolicy, InstanceState, smallest_level, starts
from sglang_shift.cost.layouts import CALM, InstanceCosts, Load, RequestClass, layouts, outlook
from sglang_shift.cost.model import PHASES, CostModel, Curve
from sglang_shift.modes import MODES
from sglang_shift.policy.instances import AutoPolicy, Demand, PaperPolicy, merge, place, simplified

STEP = 0.01


def constant(ranks: int, tokens: int, step: float = STEP) -> InstanceCosts:
    """Every step takes the same time."""
    by_mode = dict.fromkeys(MODES, Curve((1,), (step,)))
    model = CostModel(dict.fromkeys(PHASES, by_mode), dict.fromkeys(PHASES, Curve((1,), (1.0,))),
                      dict.fromkeys(PHASES, 0.0), 0.0)  # fmt: skip
    return InstanceCosts(ranks, model, tokens, chunk=100)


def with_reads(level: InstanceCosts, seconds: float) -> InstanceCosts:
    """The level with seconds for each read of the KV cache."""
    return replace(level, costs=replace(level.costs, attention=dict.fromkeys(PHASES, seconds)))


LEVELS = {1: constant(1, 1000), 2: constant(2, 2000), 4: constant(4, 4000)}


def state(ranks: int, used: int = 0, **other: Any) -> InstanceState:
    return InstanceState(ranks, used=used, capacity=1000 * ranks, **other)


def test_little_s_law():
    """10 requests of 100 tokens fit. A request takes 50 steps, and its prompt of 50 tokens half a step."""
    load = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)])
    assert load.most == 10
    assert load.batched_seconds == pytest.approx(STEP / 2)
    assert load.capacity == pytest.approx(10 / (50 * STEP + 10 * STEP / 2))
    assert load.loss == 0
    # One request alone: its prompt takes a step, and the prompts of others hardly slow it down.
    slow = Load(LEVELS[1], [RequestClass(1e-6, 50, 50, 100)])
    assert slow.latency() == pytest.approx(51 * STEP, rel=1e-3)


def test_the_loss_is_what_calm_instances_do_not_serve():
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    assert Load(LEVELS[1], [RequestClass(2 * capacity, 50, 50, 100)]).loss == pytest.approx(1 - CALM / 2)
    assert Load(LEVELS[1], [RequestClass(CALM * capacity, 50, 50, 100)]).loss == 0


def test_a_cache_is_not_full_while_the_next_request_waits_for_room():
    """One or two requests of 400 tokens run in 1,000. In four times as much, hardly anything is lost."""
    alike = RequestClass(1.0, 350, 50, 400, square=400.0**2)
    assert Load(LEVELS[1], [alike]).most == 1.5
    assert Load(LEVELS[4], [alike]).most == 9
    half_as_long = RequestClass(1.0, 150, 50, 200, square=200.0**2)
    mixed = Load(LEVELS[4], [alike, half_as_long])
    assert mixed.most == pytest.approx((4000 - (400**2 + 200**2) / 2 / 300) / 300)


def test_requests_of_different_lengths():
    """With a variance, the number of running requests varies, and attention takes longer."""
    square = 2 * 100.0**2
    mixed, alike = (Load(LEVELS[4], [RequestClass(1.0, 50, 50, 100, square=each)]) for each in (square, 100.0**2))
    assert mixed.spread == 1 and alike.spread == 0
    n, deviation = mixed.most, mixed.most**0.5
    rates = [running / (50 * STEP + running * STEP / 2) for running in (n - deviation, n + deviation)]
    assert mixed.capacity == pytest.approx(sum(rates) / 2)
    reading = with_reads(LEVELS[4], 1e-7)
    mixed, alike = (Load(reading, [RequestClass(1.0, 50, 50, 100, square=each)]) for each in (square, 100.0**2))
    assert mixed.batched_seconds - alike.batched_seconds == pytest.approx(1e-7 * 100**2 / 2)
    assert mixed.prompt_seconds - alike.prompt_seconds == pytest.approx(1e-7 * 100**2 / 2)


def test_layouts():
    assert layouts(4, [1, 2, 4]) == [(1, 1, 1, 1), (2, 2), (4,), (2, 1, 1)]
    assert (4, 2, 2) in layouts(8, [1, 2, 4, 8])
    assert all(sum(layout) == 8 for layout in layouts(8, [1, 2, 4, 8]))


def test_a_layout_that_holds_no_request_of_a_class_has_no_outlook():
    demand = [RequestClass(1.0, 50, 50, 100), RequestClass(0.1, 1900, 50, 1950)]
    assert outlook((1, 1, 1, 1), LEVELS, demand) is None
    assert outlook((2, 1, 1), LEVELS, demand) is not None


def test_requests_that_fit_everywhere_are_divided():
    """An instance of two ranks serves 1.83 times as much as a replica: 3.5 times as much needs it and both replicas."""
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    demand = [RequestClass(3.5 * CALM * capacity, 50, 50, 100)]
    assert outlook((2, 1, 1), LEVELS, demand).loss == 0
    assert outlook((1, 1, 1, 1), LEVELS, demand).loss == 0
    assert outlook((4,), LEVELS, demand).loss > 0.1


def test_routes():
    deployment = Deployment(0.0, (state(1, 500), state(1, 100), state(2, 900)))
    assert InstancePolicy().route(deployment, 50) == 1
    assert InstancePolicy().route(deployment, 1500) == 2
    assert InstancePolicy().route(deployment, 2500) is None
    assert PaperPolicy(LEVELS).route(Deployment(0.0, (state(1, 900), state(1, 950), state(2))), 50) == 0


def test_merges_are_aligned_and_take_the_least_loaded():
    layout = (1, 1, 1, 1)
    states = [state(1, used) for used in (0, 900, 200, 300)]
    assert merge(layout, states, 2) == (1, 1, 2)
    assert merge(layout, states, 4) == (4,)
    with pytest.raises(ValueError, match="no aligned group"):
        merge((4,), [state(4)], 2)
    assert starts((2, 1, 1)) == [0, 2, 3]


def test_the_largest_instance_stays_where_it_is():
    assert place((2, 1, 1), (1, 1, 2), [state(1), state(1), state(2, 900)]) == (1, 1, 2)
    assert place((2, 1, 1), (1, 1, 1, 1), [state(1, 500), state(1), state(1), state(1)]) == (1, 1, 2)
    assert place((4, 1, 1, 1, 1), (8,), [state(8)]) == (4, 1, 1, 1, 1)
    assert place((4, 1, 1, 1, 1), (8,), [state(8)], frozenset({(4, 1, 1, 1, 1)})) == (1, 1, 1, 1, 4)
    assert place((1, 1), (2,), [state(2)], frozenset({(1, 1)})) is None
    twos = [state(4, 5000, largest=3000), state(4)]
    assert place((4, 1, 1, 1, 1), (4, 4), twos) == (4, 1, 1, 1, 1), "the idle one splits"
    assert place((4, 1, 1, 1, 1), (4, 4), twos[::-1]) == (1, 1, 1, 1, 4)
    assert place((4, 1, 1, 1, 1), (4, 4), [state(4), state(4)]) == (4, 1, 1, 1, 1), "of equal ones, the last one splits"
    four = [state(4), *(state(1) for _ in range(4))]
    assert place((4, 2, 2), (4, 1, 1, 1, 1), four) == (4, 2, 2)
    assert place((4, 2, 2), (4, 1, 1, 1, 1), four, frozenset({(4, 2, 2)})) is None, "the large one is not split"


def test_the_paper_merges_for_a_request_and_splits_at_half():
    paper = PaperPolicy(LEVELS)
    four = tuple(state(1) for _ in range(4))
    assert paper.wanted(Deployment(0.0, four, (1500,))) == (2, 1, 1)
    assert paper.wanted(Deployment(0.0, four, (9000,))) == (1, 1, 1, 1)
    assert paper.wanted(Deployment(9.0, (state(4, 2000, largest=900),), changed=0.0)) == (1, 1, 1, 1)
    assert paper.wanted(Deployment(9.0, (state(4, 2001, largest=900),), changed=0.0)) == (4,)
    assert paper.wanted(Deployment(9.0, (state(4, 1500, largest=1500),), changed=0.0)) == (4,)
    assert paper.wanted(Deployment(1.0, (state(4),), changed=0.0)) == (4,)
    assert smallest_level(LEVELS, 9000) is None


def test_the_paper_takes_its_next_choice_for_what_the_ranks_have_given_up():
    paper = PaperPolicy(LEVELS)
    twos = (state(2, 100, largest=100), state(2, 200, largest=200))
    assert paper.wanted(Deployment(0.0, twos)) == (1, 1, 2)
    assert paper.wanted(Deployment(0.0, twos, denied=frozenset({(1, 1, 2)}))) == (2, 1, 1)
    assert paper.wanted(Deployment(0.0, twos, denied=frozenset({(1, 1, 2), (2, 1, 1)}))) == (2, 2)

    ones = tuple(state(1) for _ in range(4))
    waiting = (3500, 1500, 1200)
    assert paper.wanted(Deployment(0.0, ones, waiting)) == (4,)
    assert paper.wanted(Deployment(0.0, ones, waiting, denied=frozenset({(4,)}))) == (2, 1, 1)
    assert paper.wanted(Deployment(0.0, ones, waiting, denied=frozenset({(4,), (2, 1, 1)}))) == (1, 1, 2)
    assert paper.wanted(Deployment(0.0, ones, waiting, denied=frozenset({(4,), (2, 1, 1), (1, 1, 2)}))) == (1, 1, 1, 1)


def test_the_paper_splits_what_the_parts_hold():
    """A merged instance that frees weights holds more than its parts together."""
    paper = PaperPolicy(LEVELS)
    large = {"capacity": 10_000, "largest": 900}
    assert paper.wanted(Deployment(9.0, (InstanceState(4, used=2000, **large),), changed=0.0)) == (1, 1, 1, 1)
    assert paper.wanted(Deployment(9.0, (InstanceState(4, used=2001, **large),), changed=0.0)) == (4,)


def test_demand_is_an_average_that_is_forgotten():
    demand = Demand((1000, 4000), window=10.0)
    for i in range(1000):
        demand.add(i / 10, 90, 10)
    [short] = demand.classes(100.0)
    assert short.rate == pytest.approx(10.0, rel=0.02)
    assert (short.prompt, short.output, short.need) == (pytest.approx(90), pytest.approx(10), 100)
    demand.add(100.0, 3000, 10)
    assert short.square == pytest.approx(100**2)
    assert len(demand.classes(100.0)) == 2
    assert demand.classes(100.0)[1].need == 3010
    assert [c.need for c in demand.classes(200.0)] == [3010], "a rare class is remembered longer"
    assert demand.classes(300.0) == []


def auto(**options: float) -> AutoPolicy:
    """Alone, a request is as fast at every level. Four replicas serve four times as much. It decides at once."""
    return AutoPolicy(4, LEVELS, **{"patience": 0.0, **options})


def test_auto_merges_at_once_for_a_request_that_fits_nowhere():
    deployment = Deployment(0.1, tuple(state(1) for _ in range(4)), (1500,), changed=0.0)
    assert auto().wanted(deployment) == (2, 1, 1)


def test_auto_splits_under_load_but_not_within_the_dwell_time_and_not_while_a_long_request_lives():
    policy = auto(change_seconds=0.5)
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (6 * capacity), 50, 50)
    now = 300 / (6 * capacity)
    busy = state(4, 3900, running=39, queue=(100,) * 30, largest=100)
    assert policy.wanted(Deployment(now, (busy,), changed=now - 9.0)) == (4,)
    assert policy.wanted(Deployment(now, (busy,), changed=now - 11.0)) == (1, 1, 1, 1)
    long = state(4, 3900, running=30, queue=(100,) * 50, largest=3000)
    assert policy.wanted(Deployment(now, (long,), changed=now - 11.0)) == (4,)


def test_auto_counts_what_is_served_when_nearly_all_of_the_demand_waits():
    """Each layout leaves 98 % of the demand, but replicas serve more than one instance does."""
    policy = auto(change_seconds=0.5)
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (300 * capacity), 50, 50)
    busy = state(4, 4000, running=40, queue=(100,) * 30_000, largest=100)
    assert policy.wanted(Deployment(20.0, (busy,), changed=0.0)) == (1, 1, 1, 1)
    losses = [each["loss"] for each in policy.report()["predictions"].values()]
    assert min(losses) > 0.98 and max(losses) - min(losses) < 0.01


@pytest.mark.parametrize(("largest", "changes"), [(1001, True), (4001, False)])
def test_auto_goes_on_if_the_instances_do_not_hold_a_live_request(largest, changes):
    """An operator may have split them, and ranks know better than the controller what a request still needs."""
    policy = auto()
    policy.arrived(0.0, 1500, 50)
    states = (state(1, largest, largest=largest), *(state(1) for _ in range(3)))
    wanted = policy.wanted(Deployment(1.0, states))
    assert (wanted != (1, 1, 1, 1)) == changes, wanted


def test_auto_keeps_what_is_as_good():
    policy = auto()
    policy.arrived(0.0, 50, 50)
    assert policy.wanted(Deployment(1.0, tuple(state(1) for _ in range(4)))) == (1, 1, 1, 1)
    assert auto().wanted(Deployment(1.0, (state(4),))) == (4,), "no request has come yet"


def test_auto_takes_its_next_choice_for_what_the_ranks_have_given_up():
    policy = auto()
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (6 * capacity), 50, 50)
    busy, now = (state(4, 3900, running=39, queue=(100,) * 50, largest=100),), 300 / (6 * capacity)
    tried: list[tuple[int, ...]] = []
    while (wanted := policy.wanted(Deployment(now, busy, denied=frozenset(tried)))) != (4,):
        assert wanted not in tried
        tried.append(wanted)
        now += 1.0
    assert tried[0] == (1, 1, 1, 1) and len(tried) > 1


def test_auto_watches_before_its_first_choice():
    policy = AutoPolicy(4, LEVELS)
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (6 * capacity), 50, 50)
    busy = (state(4, 3900, running=39, queue=(100,) * 30, largest=100),)
    assert policy.wanted(Deployment(9.0, busy)) == (4,)
    assert policy.wanted(Deployment(10.0, busy)) == (1, 1, 1, 1)


def test_auto_makes_its_first_choice_sooner_if_more_waits_than_runs():
    """A merge that a request needed is no choice, so that it delays none."""
    policy = AutoPolicy(4, LEVELS, change_seconds=0.5)
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (150 * capacity), 50, 50)
    late = (state(4, 3900, running=39, queue=(100,) * 50, largest=100),)
    assert policy.wanted(Deployment(1.9, late, changed=1.0)) == (4,)
    assert policy.wanted(Deployment(2.0, late, changed=1.0)) == (1, 1, 1, 1)
    assert policy.wanted(Deployment(3.5, late, changed=2.0)) == (4,), "the second choice waits for the dwell time"


def test_waiting_requests_are_demand_of_their_own_class():
    """Short requests have come as often as long ones, but only long ones wait."""
    policy = auto()
    for i in range(20):
        policy.arrived(i / 10, 50, 50)
        policy.arrived(i / 10, 1450, 50)
    full = state(2, 1500, running=1, queue=(1500,) * 30, largest=1500)
    policy.wanted(Deployment(2.0, (full, state(1), state(1)), changed=-9.0))
    short, long = policy.report()["demand"]
    arrived = policy.demand.classes(2.0)
    assert short["rate"] == arrived[0].rate, "no short one waits"
    assert long["rate"] == pytest.approx(arrived[1].rate + 30 / policy.horizon)


def test_the_dwell_time_follows_the_measured_changes():
    policy = auto(change_seconds=0.05)
    assert policy.dwell == 2.0
    for _ in range(20):
        policy.changed(1.0)
    assert policy.dwell == pytest.approx(20.0, rel=1e-3)


def test_the_reason_and_the_report_have_the_predictions():
    policy = auto()
    capacity = Load(LEVELS[1], [RequestClass(1.0, 50, 50, 100)]).capacity
    for i in range(300):
        policy.arrived(i / (6 * capacity), 50, 50)
    busy = (state(4, 3900, running=39, queue=(100,) * 50, largest=100),)
    assert policy.wanted(Deployment(3.0, busy)) == (1, 1, 1, 1)
    assert policy.reason.startswith("1+1+1+1 takes ") and "; 4 takes" in policy.reason
    report = policy.report()
    assert set(report["predictions"]) == {"1+1+1+1", "2+2", "4", "2+1+1"}
    assert report["demand"][0]["prompt"] == pytest.approx(50) and report["dwell"] == 10.0
    assert policy.wanted(Deployment(3000.0, (state(4),))) == (4,)
    report = policy.report()
    assert (report["reason"], report["demand"], report["predictions"]) == ("", [], {}), "the demand is forgotten"


def test_a_rare_class_is_remembered_longer():
    demand = Demand((1000, 4000), window=10.0)
    demand.add(0.0, 3000, 10)
    for i in range(1000):
        demand.add(i / 10, 90, 10)
    short, long = demand.classes(100.0)
    assert long.rate < 0.1 * short.rate and long.need == 3010
    for i in range(20):
        demand.add(100.0 + i / 10, 3000, 10)
    assert demand.classes(102.0)[1].rate > 1.5, "and a burst is seen at once"


def test_layouts_of_three_levels_are_simplified():
    assert simplified((1, 1, 2, 4)) == (4, 1, 1, 1, 1)
    assert simplified((2, 1, 1, 2)) == (2, 2, 1, 1)
    assert simplified((4, 4)) == (4, 4)
