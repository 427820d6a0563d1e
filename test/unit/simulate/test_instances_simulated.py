"""Instances that merge and split in the simulator, beside the simulator of a single server."""

from __future__ import annotations

import random
from itertools import cycle

import pytest
from sglang_shift.cost.deployment import InstancePolicy
from sglang_shift.cost.layouts import InstanceCosts
from sglang_shift.cost.model import PHASES, CostModel, Curve
from sglang_shift.modes import MODES, Mode
from sglang_shift.policy.builtin import FixedMode
from sglang_shift.policy.instances import AutoPolicy, PaperPolicy
from sglang_shift.simulate import simulator
from sglang_shift.simulate.instances import Transformation, blocks, simulate
from sglang_shift.simulate.traffic import Request, steady

POOL = 1000


def costs(ranks: int = 1) -> CostModel:
    """A step has a fixed time and a time per token. More ranks are faster per token, but less than in proportion."""
    curve = Curve((1, 1000), (0.01 + 0.002 * ranks, 0.01 + 0.002 * ranks + 1.0 / ranks**0.8))
    by_mode = dict.fromkeys(MODES, curve)
    return CostModel(dict.fromkeys(PHASES, by_mode), dict.fromkeys(PHASES, Curve((1,), (1.0,))),
                     {"prefill": 1e-7, "decode": 1e-6}, 0.0)  # fmt: skip


def levels(*sizes: int) -> dict[int, InstanceCosts]:
    return {k: InstanceCosts(k, costs(k), k * POOL, chunk=256) for k in sizes}


def requests(number: int = 60, rate: float = 5.0, seed: int = 0) -> list[Request]:
    return steady(rate, prompt=(1, 400), output=(1, 60), requests=number, seed=seed)


@pytest.mark.parametrize("rate", [0.5, 5.0, 50.0])
def test_one_instance_is_a_server(rate):
    sent = requests(rate=rate)
    server = simulator.Server(chunk=256, pool=POOL)
    expected = simulator.simulate(sent, FixedMode(Mode.TP), costs(), server).served
    outcome = simulate(sent, InstancePolicy(), levels(1), (1,))
    assert outcome.unserved == 0
    found = {id(s.request): s for s in outcome.served}
    for one in expected:
        mine = found[id(one.request)]
        assert (mine.ttft, mine.e2e) == pytest.approx((one.ttft, one.e2e), rel=1e-9)
        assert mine.tpot == (None if one.tpot is None else pytest.approx(one.tpot, rel=1e-9))


def test_replicas_are_servers_of_their_own():
    sent = requests(40)
    outcome = simulate(sent, InstancePolicy(), levels(1), (1, 1))
    one = simulate(sent, InstancePolicy(), levels(1), (1,))
    assert sum(s.e2e for s in outcome.served) < sum(s.e2e for s in one.served)
    assert outcome.seconds_at.keys() == {(1, 1)}


class Restless(InstancePolicy):
    """Asks for another layout at every opportunity."""

    changes_layout = True

    def __init__(self) -> None:
        self.layouts = cycle([(2, 1, 1), (4,), (1, 1, 2), (2, 2), (1, 1, 1, 1), (4,)])

    def wanted(self, deployment):
        return next(self.layouts)


@pytest.mark.parametrize("seed", range(5))
def test_no_request_is_lost_or_served_twice_whatever_changes(seed):
    sent = requests(200, rate=20.0, seed=seed)
    outcome = simulate(sent, Restless(), levels(1, 2, 4), (1, 1, 1, 1), Transformation(0.05, 1e-5))
    assert len(outcome.changes) > 20
    assert (outcome.unserved, outcome.rejected) == (0, [])
    assert sorted(map(id, sent)) == sorted(id(s.request) for s in outcome.served)
    assert all(0 < s.ttft <= s.e2e for s in outcome.served)
    assert sum(outcome.seconds_at.values()) == pytest.approx(max(s.end for s in outcome.served) - sent[0].time, abs=0.2)


def test_the_price_of_a_change():
    sent = [Request(0.0, 100, 300), Request(0.0, 100, 300)]

    class Once(InstancePolicy):
        changes_layout = True

        def wanted(self, deployment):
            return (2,) if deployment.now > 1.0 else (1, 1)

    ends = [
        max(s.end for s in simulate(sent, Once(), levels(1, 2), (1, 1), Transformation(seconds)).served)
        for seconds in (0.0, 7.0)
    ]
    assert ends[1] - ends[0] == pytest.approx(7.0)


def test_requests_that_no_layout_holds_are_rejected():
    long = Request(0.0, 3 * POOL, 10)
    for policy, rejected in (
        (InstancePolicy(), True), (PaperPolicy(levels(1, 2, 4)), False), (AutoPolicy(4, levels(1, 2, 4)), False),
    ):  # fmt: skip
        outcome = simulate([long, *requests(10)], policy, levels(1, 2, 4), (1, 1, 1, 1))
        assert (outcome.rejected == [long]) is rejected
        assert len(outcome.served) == (10 if rejected else 11)
    huge = Request(0.0, 5 * POOL, 10)
    assert simulate([huge], AutoPolicy(4, levels(1, 2, 4)), levels(1, 2, 4), (4,)).rejected == [huge]


def test_a_split_waits_until_the_parts_hold_the_requests():
    long = Request(0.0, 3 * POOL, 200)
    policy = PaperPolicy(levels(1, 2, 4), dwell=0.0)
    outcome = simulate([long, *requests(30)], policy, levels(1, 2, 4), (1, 1, 1, 1))
    (merged, first), (split, second), *_ = outcome.changes
    end = next(s.end for s in outcome.served if s.request is long)
    assert (first, second) == ((4,), (1, 1, 1, 1))
    assert merged < end <= split


def test_auto_is_never_far_below_the_best_static_layout():
    """The unit is the work that is done in a window in which requests always wait."""
    rng, sizes = random.Random(1), levels(1, 2, 4)
    for share in (0.0, 0.05):
        sent = [
            Request(r.time, 1500, r.output) if rng.random() < share else r for r in requests(1500, rate=12.0, seed=3)
        ]
        window = (sent[-1].time / 4, sent[-1].time)
        best = 0.0
        for layout in ((1, 1, 1, 1), (2, 2), (4,)):
            outcome = simulate(sent, InstancePolicy(), sizes, layout, until=window[1])
            best = max(best, 0.0 if outcome.rejected else outcome.tokens_per_second(*window))
        auto = simulate(sent, AutoPolicy(4, sizes, 0.1), sizes, (4,), Transformation(0.1), until=window[1])
        assert auto.rejected == []
        assert auto.tokens_per_second(*window) > 0.95 * best


def test_auto_is_soon_one_instance_if_long_requests_come_first():
    """Two ranks merge at once for the first long one. The others wait for these, while two ranks have no requests."""
    sizes = levels(1, 2, 4)
    sent = [*requests(20, rate=20.0), *(Request(0.5 + i / 10, 1500, 50) for i in range(10))]
    shift = simulate(sent, InstancePolicy(), sizes, (4,))
    auto = simulate(sent, AutoPolicy(4, sizes, 0.1), sizes, (1, 1, 1, 1), Transformation(0.1))
    (_, first), (merged, second), *_ = auto.changes
    assert first == (1, 1, 2) and second == (4,) and merged < 9.0
    assert max(s.end for s in auto.served) < 1.17 * max(s.end for s in shift.served)


def test_blocks_are_what_changes_together():
    assert blocks([0, 1, 2, 3], [0], 4) == [(0, 4)]
    assert blocks([0, 2], [0, 1, 2], 4) == [(0, 2), (2, 4)]
    assert blocks([0, 2, 4], [0, 4, 6], 8) == [(0, 4), (4, 8)]


class SplitOnce(InstancePolicy):
    """Splits two ranks after a second."""

    changes_layout = True

    def wanted(self, deployment):
        return (1, 1) if deployment.now > 1.0 else deployment.layout


def test_what_has_no_room_after_a_split_is_computed_again():
    """Three requests of 600 tokens fit two ranks. Each rank alone has room for one of them."""
    sent = [Request(0.0, 400, 200) for _ in range(3)]
    outcome = simulate(sent, SplitOnce(), levels(1, 2), (2,), Transformation(0.1))
    assert len(outcome.changes) == 1 and len(outcome.served) == 3
    assert 400 < outcome.recomputed < 600, "one prompt, and what it had generated"
    assert sum(outcome.computed.values()) == pytest.approx(3 * 600, abs=1), "work that was lost does not count"
    last = max(s.e2e for s in outcome.served)
    assert last > 1.5 * min(s.e2e for s in outcome.served), "it waits until another request has ended"
    assert all(s.ttft < 1.0 for s in outcome.served), "the first token had come before"


def test_the_work_of_a_window_has_no_edges():
    sent = requests(200)
    outcome = simulate(sent, InstancePolicy(), levels(1, 2), (1, 1))
    assert sum(outcome.computed.values()) == sum(r.prompt + r.output for r in sent)
    assert outcome.computed_per_second(0, 10) == sum(outcome.computed[second] for second in range(10)) / 10
