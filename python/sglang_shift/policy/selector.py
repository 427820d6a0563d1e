"""The mode selector: asks the policy, keeps what the next step may look at, and counts."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from sglang_shift.config import DEFAULT_THRESHOLD, ShiftConfig
from sglang_shift.cost.calibration import Calibration
from sglang_shift.cost.model import PHASES, CostModel
from sglang_shift.errors import PolicyFailed
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policy.builtin import Calibrated, FixedMode, QueueDepth, TokenThreshold, load_policy
from sglang_shift.policy.probes import Probes

logger = logging.getLogger(__name__)

DRIFT = 1.5
"""Step times have drifted where actual over predicted ones, or this of TP over this of SP, are so far from 1."""
DRIFT_STEPS = 256
"""Steps of a mode over which drift is measured."""
ENOUGH_STEPS = 32
"""Steps of a phase in each mode after which these are compared. Of the mode that is not chosen, most are probes."""


def make_policy(config: ShiftConfig, costs: CostModel | None, chunk: int) -> ShiftPolicy:
    """The policy that ``config`` names.

    Args:
        config: The settings.
        costs: Predicted step times; without them ``calibrated`` becomes ``queue-depth``.
        chunk: Prompt tokens that one step takes.

    Raises:
        Refused: a policy of the user's that cannot be loaded.
    """
    if config.policy in (Mode.TP.value, Mode.SP.value):
        return FixedMode(Mode(config.policy))
    if config.policy == "calibrated" and costs is not None:
        return Calibrated(costs, chunk)
    if config.policy in ("calibrated", "queue-depth"):
        return QueueDepth(
            config.threshold, config.enter_requests, config.leave_requests, config.enter_tokens, config.leave_tokens
        )
    if config.policy == "tokens":
        return TokenThreshold(config.threshold)
    return load_policy(config.policy)


@dataclass(frozen=True)
class Choice:
    """What was decided for one step.

    Attributes:
        step: The state it was decided on.
        mode: The mode.
        switched: Whether it is not that of the step before, probes left out.
        probe: Whether it is the mode that the policy did not choose.
    """

    step: StepState
    mode: Mode
    switched: bool
    probe: bool = False


class ModeSelector:
    """Chooses a mode per step. Its state follows from the steps alone, so it is the same on every rank.

    Attributes:
        policy: The policy.
        policy_text: The policy in words.
        probes: Which steps are probes; None where there are none.
        calibration: Where predictions come from, or None.
        count: Steps so far.
        steps: Steps so far, by mode.
        tokens: Tokens so far, by mode.
        switches: Changes of mode so far, probes left out.
    """

    def __init__(self, policy: ShiftPolicy) -> None:
        self.policy = policy
        self.calibration: Calibration | None = None
        self.count = 0
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
        self.probes = Probes(policy.costs) if isinstance(policy, Calibrated) else None

    @property
    def asks_for_drift(self) -> bool:
        """Whether all ranks are to agree now, between two steps, on what :meth:`doubt` takes."""
        return self.count % (2 * DRIFT_STEPS) == 0 and isinstance(self._policy, Calibrated)

    def doubt(self, doubts: dict[str, float]) -> None:
        """How far the ratio of the modes' times is off, by phase, from the next step on; the same on every rank."""
        if isinstance(self._policy, Calibrated) and self._policy.doubts != doubts:
            self._policy = replace(self._policy, doubts=doubts)

    def counters(self) -> dict[str, Any]:
        """Steps and tokens by mode, and switches, as JSON."""
        return {
            "steps": {mode.value: n for mode, n in self.steps.items()},
            "tokens": {mode.value: n for mode, n in self.tokens.items()},
            "switches": self.switches,
        }

    def choose(self, step: StepState) -> Choice:
        """The mode of ``step``, whose ``previous_mode`` and ``steps_since_switch`` are filled in here.

        A policy of the user's that fails is replaced for good, on every rank in this step, by ``tokens``.
        """
        step = replace(step, previous_mode=self.previous_mode, steps_since_switch=self.steps_since_switch)
        try:
            chosen = self._policy.choose(step)
        except PolicyFailed as error:
            fallback = TokenThreshold(DEFAULT_THRESHOLD)
            logger.error("sglang_shift: %s; from now on: %s", error, fallback.describe())
            self.policy = fallback
            return self.choose(step)
        switched = self.previous_mode not in (None, chosen)
        probe = self.probes is not None and self.probes.due(step, chosen, switched)
        mode = chosen.other if probe else chosen
        self.count += 1
        self.steps[mode] += 1
        self.tokens[mode] += step.num_tokens
        self.switches += switched
        self.steps_since_switch = 0 if switched else self.steps_since_switch + 1
        self.previous_mode = chosen  # a policy that stays where it is must not follow a probe
        return Choice(step, mode, switched, probe)

    def predict(self, step: StepState) -> dict[Mode, float] | None:
        """Predicted seconds in each mode, or None without a calibration."""
        if self.calibration is None:
            return None
        return {mode: self.calibration.costs.predict(mode, step) for mode in Mode}


class Drift:
    """How far actual step times have moved from the predicted ones: one rank's view, from its clock."""

    def __init__(self) -> None:
        self._ratios = {(phase, mode): deque[float](maxlen=DRIFT_STEPS) for phase in PHASES for mode in Mode}
        self._all = {mode: deque[float](maxlen=DRIFT_STEPS) for mode in Mode}

    def add(self, mode: Mode, predicted: float, seconds: float, phase: str = "decode") -> None:
        """Record a step. Times that a clock cannot have measured are left out; a mixed step is a prefill."""
        if predicted > 0 and 0 < seconds < 3600:
            self._ratios["decode" if phase == "decode" else "prefill", mode].append(seconds / predicted)
            self._all[mode].append(seconds / predicted)

    def ratio(self, mode: Mode) -> float | None:
        """Median of actual over predicted time of the last steps; None before there are enough."""
        ratios = self._all[mode]
        return median(ratios) if len(ratios) == DRIFT_STEPS else None

    def skew(self, phase: str) -> float | None:
        """How far the ratio of TP's time to SP's is off in ``phase``, as a factor; None before enough of each ran.

        This is what decides between the modes. What slows both alike leaves it at 1.
        """
        tp, sp = (self._ratios[phase, mode] for mode in (Mode.TP, Mode.SP))
        return median(tp) / median(sp) if min(len(tp), len(sp)) >= ENOUGH_STEPS else None

    @property
    def doubts(self) -> dict[str, float]:
        """By phase, by which share the predicted ratio of the modes is off; only where it has drifted.

        Above 0 where TP is slower beside SP than predicted, below 0 where SP is beside TP. Where one mode has not run
        often enough to compare, it is taken to be as predicted, and the ratio to be off by :data:`DRIFT` at most: what
        slowed the mode that ran may well slow both.
        """
        found = {}
        for phase in PHASES:
            off = self.skew(phase)
            if off is None:
                tp, sp = (self._of(phase, mode) or 1.0 for mode in (Mode.TP, Mode.SP))
                off = min(max(tp / sp, 1 / DRIFT), DRIFT)
            if (factor := max(off, 1 / off)) >= DRIFT:
                found[phase] = factor - 1 if off > 1 else 1 - factor
        return found

    @property
    def drifted(self) -> bool:
        """Whether either mode's step times, or their ratio in a phase, are off by more than :data:`DRIFT`."""
        off = [self.ratio(mode) for mode in Mode] + [self.skew(phase) for phase in PHASES]
        return any(r is not None and max(r, 1 / r) > DRIFT for r in off)

    def clear(self) -> None:
        """Forget all steps."""
        for ratios in (*self._ratios.values(), *self._all.values()):
            ratios.clear()

    def _of(self, phase: str, mode: Mode) -> float | None:
        ratios = self._ratios[phase, mode]
        return median(ratios) if len(ratios) == DRIFT_STEPS else None
