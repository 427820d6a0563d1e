"""When an instance measures the steps of its level again, and what it tells the controller, without ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang_shift.cost.calibration import Calibration
from sglang_shift.cost.layouts import InstanceCosts
from sglang_shift.cost.model import Measurement
from sglang_shift.instances.messages import LevelCosts
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.builtin import FixedMode
from sglang_shift.policy.selector import ModeSelector
from sglang_shift.runtime import instance_scheduler as module
from sglang_shift.runtime.instance_scheduler import InstanceScheduler
from sglang_shift.runtime.scheduler import ShiftScheduler


def calibration(seconds: float) -> Calibration:
    times = [
        Measurement(phase, mode, n, n, seconds) for phase in ("prefill", "decode") for mode in Mode for n in (1, 2)
    ]
    return Calibration.from_measurements({}, 1.0, times, 0.0)


OLD, NEW = calibration(0.1), calibration(0.2)
COSTS = {level: InstanceCosts(level, OLD.costs, 100 * level, chunk=64 * level) for level in (1, 2)}


class FakeCalibrator:
    """Its calibration is new at each look."""

    calibration = OLD
    measuring = False
    looks = 0

    def idle(self, steps, drifted):
        self.looks += 1
        self.calibration = NEW
        return NEW


@pytest.fixture
def scheduler(monkeypatch):
    """The scheduler of a leader at level 2, with the policy auto."""
    scheduler = InstanceScheduler.__new__(InstanceScheduler)
    scheduler.told = []
    scheduler.shift_switch = SimpleNamespace(tp_only=False, level=2, place=SimpleNamespace(leads=True, has_sp=True))
    scheduler.shift_chunks = SimpleNamespace(active=False)
    scheduler.shift_calibrator, scheduler.shift_selector = FakeCalibrator(), ModeSelector(FixedMode(Mode.TP))
    scheduler.shift_reporter, scheduler._costs = None, LevelCosts(COSTS, {})
    scheduler.shift_config = SimpleNamespace(instance_policy="auto")
    monkeypatch.setattr(InstanceScheduler, "set_policy", lambda *_: None)
    monkeypatch.setattr(InstanceScheduler, "tell_controller", lambda self, message: self.told.append(message))
    return scheduler


def test_the_leader_tells_the_controller_the_new_times_of_its_level(scheduler):
    assert scheduler.renew_calibration()
    [message] = scheduler.told
    assert message.costs.costs is NEW.costs and scheduler.shift_selector.calibration is NEW
    assert (message.costs.ranks, message.costs.tokens, message.costs.chunk) == (2, 200, 128)
    assert COSTS[2].costs is OLD.costs, "functions that remember results know the object"


@pytest.mark.parametrize("who", ["a rank that follows", "another policy"])
def test_nothing_is_told_by_others(scheduler, who):
    if who == "another policy":
        scheduler._costs = None
    else:
        scheduler.shift_switch.place.leads = False
    assert scheduler.renew_calibration() and not scheduler.told
    assert scheduler.shift_selector.calibration is NEW


def test_an_instance_without_the_weights_for_sp_measures_nothing(scheduler):
    scheduler.shift_switch.tp_only = True
    assert not scheduler.renew_calibration()
    assert scheduler.shift_calibrator.looks == 0 and not scheduler.told


@pytest.mark.parametrize("reason", [None, "images"])
def test_a_step_of_one_rank_keeps_another_reason_for_tp(scheduler, monkeypatch, reason):
    """A step with images computes more than the calibration knows, also on one rank."""
    monkeypatch.setattr(ShiftScheduler, "step_state", lambda *_: StepState(1, needs_tp=reason))
    scheduler.shift_switch.place.has_sp = False
    assert scheduler.step_state(None).needs_tp == (reason or module.ALONE)


@pytest.mark.parametrize(
    ("policy", "target", "measures"),
    [("auto", False, True), ("paper", False, False), ("paper", True, True), ("fixed", False, False)],
)
def test_an_instance_without_sp_measures_if_something_is_chosen_by_its_times(scheduler, policy, target, measures):
    scheduler.shift_switch.place.has_sp, scheduler.shift_chunks.active = False, target
    scheduler.shift_config.instance_policy = policy
    assert scheduler.renew_calibration() is measures
    assert bool(scheduler.shift_calibrator.looks) is measures


def test_a_measurement_that_has_begun_ends_although_nothing_is_chosen_by_it_now(scheduler):
    """With --sleep-on-idle, a leader does not sleep before its end."""
    scheduler.shift_switch.place.has_sp, scheduler.shift_config.instance_policy = False, "fixed"
    scheduler.shift_calibrator.measuring = True
    assert scheduler.renew_calibration()


@pytest.mark.parametrize(("of_level_2", "calibrated"), [(OLD, True), (None, False)])
def test_all_levels_have_step_times_or_no_instance_decides_by_them(scheduler, of_level_2, calibrated):
    """Otherwise some instances would take a bound on gaps from an operator, and others would refuse it."""
    scheduler.shift_calibrators = {
        1: SimpleNamespace(calibration=OLD), 2: SimpleNamespace(calibration=of_level_2)
    }  # fmt: skip
    scheduler.shift_selector.calibration = OLD
    assert scheduler.shift_calibrated is calibrated


def test_steps_of_one_rank_are_compared_with_their_predictions(scheduler, monkeypatch):
    reporter = SimpleNamespace(timed_reasons=frozenset({None}))
    monkeypatch.setattr(ShiftScheduler, "make_reporter", lambda self: reporter)
    assert scheduler.make_reporter().timed_reasons == {None, module.ALONE}
