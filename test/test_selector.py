"""The mode selector's bookkeeping, and what it does with a policy that fails."""

from __future__ import annotations

import pytest
from sglang_shift.config import ShiftConfig
from sglang_shift.cost_model import Measurement, fit
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policies import Calibrated, FixedMode, QueueDepth, TokenThreshold
from sglang_shift.selector import ModeSelector, make_policy

COSTS = fit([Measurement(phase, mode, 1, 1, 0.1) for phase in ("prefill", "decode") for mode in Mode])


class Recorder(ShiftPolicy):
    """Alternates, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[StepState] = []

    def choose(self, step):
        self.seen.append(step)
        return Mode.SP if len(self.seen) % 3 == 0 else Mode.TP


def test_the_policy_sees_the_past():
    selector = ModeSelector(Recorder())
    choices = [selector.choose(StepState(num_tokens=n)) for n in (1, 2, 4, 8, 16)]
    seen = selector.policy.seen
    assert [s.previous_mode for s in seen] == [None, "tp", "tp", "sp", "tp"]
    assert [s.steps_since_switch for s in seen] == [0, 1, 2, 0, 0]
    assert [c.switched for c in choices] == [False, False, True, True, False]
    assert selector.steps == {Mode.TP: 4, Mode.SP: 1}
    assert selector.tokens == {Mode.TP: 27, Mode.SP: 4}
    assert selector.switches == 2


class Failing(ShiftPolicy):
    def choose(self, step):
        if step.num_tokens > 5:
            raise ZeroDivisionError
        return Mode.SP


class Nonsense(ShiftPolicy):
    def choose(self, step):
        return "fast"


@pytest.mark.parametrize("policy", [Failing(), Nonsense()])
def test_a_policy_that_fails_is_replaced(policy, caplog):
    selector = ModeSelector(policy)
    selector.choose(StepState(num_tokens=1))
    assert selector.choose(StepState(num_tokens=1000)).mode is Mode.SP
    assert isinstance(selector.policy, TokenThreshold)
    assert type(policy).__name__ in caplog.text
    assert sum(selector.steps.values()) == 2, "no step counted twice"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"policy": "tp"}, FixedMode(Mode.TP)),
        ({"policy": "sp"}, FixedMode(Mode.SP)),
        ({"policy": "tokens", "threshold": 9}, TokenThreshold(9)),
        ({"policy": "queue-depth", "threshold": 9, "enter_tokens": 99}, QueueDepth(threshold=9, enter_tokens=99)),
        ({"policy": "calibrated"}, Calibrated(COSTS, 512)),
    ],
)
def test_policies_by_name(fields, expected):
    assert make_policy(ShiftConfig(2, 2, True, **fields), COSTS, 512) == expected


def test_calibrated_without_a_calibration_is_the_token_threshold():
    assert make_policy(ShiftConfig(2, 2, True, "calibrated"), None, 512) == TokenThreshold(256)


def test_a_policy_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(
        "from sglang_shift.modes import Mode, ShiftPolicy\n"
        "class Mine(ShiftPolicy):\n"
        "    def choose(self, step):\n"
        "        return Mode.SP if step.num_waiting else Mode.TP\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    policy = make_policy(ShiftConfig(2, 2, True, "my_policy:Mine"), None, 512)
    assert policy.choose(StepState(1, num_waiting=1)) is Mode.SP
    assert policy.describe() == "Mine"
