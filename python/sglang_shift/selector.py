"""The mode selector: asks the policy, keeps what the next step may look at, and counts."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from sglang_shift.calibration import Calibration
from sglang_shift.config import DEFAULT_THRESHOLD, ShiftConfig
from sglang_shift.cost_model import CostModel
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policies import Calibrated, FixedMode, QueueDepth, TokenThreshold, load_policy

logger = logging.getLogger(__name__)

DRIFT = 1.5
"""Actual step times that are this many times the predicted ones, or the predicted them, have drifted."""
DRIFT_STEPS = 256
"""Steps of a mode over which drift is measured."""


def make_policy(config: ShiftConfig, costs: CostModel | None, chunk: int) -> ShiftPolicy:
    """The policy that ``config`` names.

    Args:
        config: The settings.
        costs: Predicted step times; without them ``calibrated`` becomes ``tokens``.
        chunk: Prompt tokens that one step takes.

    Raises:
        Refused: a policy of the user's that cannot be loaded.
    """
    if config.policy in (Mode.TP.value, Mode.SP.value):
        return FixedMode(Mode(config.policy))
    if config.policy == "queue-depth":
        return QueueDepth(
            config.threshold, config.enter_requests, config.leave_requests, config.enter_tokens, config.leave_tokens
        )
    if config.policy == "calibrated" and costs is not None:
        return Calibrated(costs, chunk)
    if config.policy in ("calibrated", "tokens"):
        return TokenThreshold(config.threshold)
    return load_policy(config.policy)


@dataclass(frozen=True)
class Choice:
    """What was decided for one step.

    Attributes:
        step: The state it was decided on.
        mode: The mode.
        switched: Whether it is not that of the step before.
        reason: Why, where it switched; else empty.
    """

    step: StepState
    mode: Mode
    switched: bool
    reason: str


class ModeSelector:
    """Chooses a mode per step. Its state follows from the steps alone, so it is the same on every rank.

    Attributes:
        policy: The policy.
        policy_text: The policy in words.
        calibration: Where predictions come from, or None.
        steps: Steps so far, by mode.
        tokens: Tokens so far, by mode.
        switches: Changes of mode so far.
    """

    def __init__(self, policy: ShiftPolicy) -> None:
        self.policy = policy
        self.calibration: Calibration | None = None
        self.steps = dict.fromkeys(Mode, 0)
        self.tokens = dict.fromkeys(Mode, 0)
        self.switches = 0
        self.previous_mode: Mode | None = None
        self.steps_since_switch = 0

    @property
    def policy(self) -> ShiftPolicy:
        """The policy."""
        return self._policy

    @policy.setter
    def policy(self, policy: ShiftPolicy) -> None:
        self._policy = policy
        # Kept: it can take milliseconds, and is asked for every second between steps.
        self.policy_text = policy.describe()

    def counters(self) -> dict[str, Any]:
        """Steps and tokens by mode, and switches, as JSON."""
        return {
            "steps": {mode.value: n for mode, n in self.steps.items()},
            "tokens": {mode.value: n for mode, n in self.tokens.items()},
            "switches": self.switches,
        }

    def choose(self, step: StepState) -> Choice:
        """The mode of ``step``, whose ``previous_mode`` and ``steps_since_switch`` are filled in here.

        A policy of the user's that fails is replaced for good, on every rank alike, by ``tokens``.
        """
        step = replace(step, previous_mode=self.previous_mode, steps_since_switch=self.steps_since_switch)
        try:
            mode = Mode(self.policy.choose(step))
            switched = self.previous_mode not in (None, mode)
            reason = self.policy.explain(step, mode) if switched else ""
        except Exception:  # whatever the user's code raises
            fallback = TokenThreshold(DEFAULT_THRESHOLD)
            logger.exception("%s failed; from now on: %s", self.policy_text, fallback.describe())
            self.policy = fallback
            return self.choose(step)
        self.steps[mode] += 1
        self.tokens[mode] += step.num_tokens
        self.switches += switched
        self.steps_since_switch = 0 if switched else self.steps_since_switch + 1
        self.previous_mode = mode
        return Choice(step, mode, switched, reason)

    def predict(self, step: StepState) -> dict[Mode, float] | None:
        """Predicted seconds in each mode, or None without a calibration."""
        if self.calibration is None:
            return None
        return {mode: self.calibration.costs.predict(mode, step) for mode in Mode}


class Drift:
    """How far actual step times have moved from the predicted ones: one rank's view, from its clock."""

    def __init__(self) -> None:
        self._ratios = {mode: deque[float](maxlen=DRIFT_STEPS) for mode in Mode}

    def add(self, mode: Mode, predicted: float, seconds: float) -> None:
        """Record a step. Times that a clock cannot have measured are left out."""
        if predicted > 0 and 0 < seconds < 3600:
            self._ratios[mode].append(seconds / predicted)

    def ratio(self, mode: Mode) -> float | None:
        """Median of actual over predicted time of the last steps; None before there are enough."""
        ratios = self._ratios[mode]
        return median(ratios) if len(ratios) == DRIFT_STEPS else None

    @property
    def drifted(self) -> bool:
        """Whether either mode's step times are off by more than :data:`DRIFT`."""
        ratios = [r for mode in Mode if (r := self.ratio(mode)) is not None]
        return any(not 1 / DRIFT < r < DRIFT for r in ratios)

    def clear(self) -> None:
        """Forget all steps."""
        for ratios in self._ratios.values():
            ratios.clear()
