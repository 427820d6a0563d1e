"""What rank 0 reports of steps that the policy did not choose."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_shift.cost.calibration import Calibration
from sglang_shift.cost.model import Measurement
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.builtin import FixedMode
from sglang_shift.policy.selector import DRIFT_STEPS, ModeSelector
from sglang_shift.runtime.reporter import StepReporter


class Published:
    replica = 0

    def __init__(self):
        self.events = []

    def send(self, event):
        self.events.append(event)


def test_a_step_that_needs_tp_has_its_reason_and_is_no_drift():
    selector, published = ModeSelector(FixedMode(Mode.SP)), Published()
    times = [Measurement(phase, mode, n, n, 0.1) for phase in ("prefill", "decode") for mode in Mode for n in (1, 2)]
    selector.calibration = Calibration.from_measurements({}, 1.0, times, 0.0)
    reporter = StepReporter(selector, published, dict, SimpleNamespace(bytes_sent=0, calls=0))
    for number in range(2 * DRIFT_STEPS):
        state = StepState(num_tokens=1, needs_tp="an adapter" if number % 2 else None)
        reporter.on_launch(number, selector.choose(state), SimpleNamespace(seconds=0.1), None)
        reporter.after_result(SimpleNamespace(forward_iter=number, reqs=[]))
    steps = [event for event in published.events if hasattr(event, "reason")]
    expected = [("sp", "", False), ("tp", "an adapter", False)] * 2
    assert [(step.mode, step.reason, step.switched) for step in steps[:4]] == expected
    assert reporter.drift.ratio(Mode.SP) is not None and reporter.drift.ratio(Mode.TP) is None
