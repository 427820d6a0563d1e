"""The mode selector asks the policy, keeps the state that the next step needs, and counts steps."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from statistics import median
from typing import Any

from sglang_shift.config import ShiftConfig
from sglang_shift.cost.calibration import Calibration
from sglang_shift.cost.model import PHASES, CostModel
from sglang_shift.errors import PolicyFailed
from sglang_shift.modes import MODES, Mode, ShiftPolicy, StepState
from sglang_shift.policy.builtin import Calibrated, Doubt, FixedMode, QueueDepth, TokenThreshold, load_policy
from sglang_shift.policy.probes import Probes

logger = logging.getLogger(__name__)

DRIFT = 1.5
"""Step times have drifted if they, or the ratio of two modes' times, differ from the prediction by this factor."""
DRIFT_STEPS = 256
"""Steps of a mode over which drift is measured."""
MIN_STEPS = 32
"""Steps of a phase in each of two modes after which these modes are compared.

If the policy does not choose a mode, most steps in this mode are probes.
"""
DOUBTS: tuple[Doubt, ...] = tuple((phase, *pair) for phase in PHASES for pair in permutations(MODES, 2))
"""All possible doubts, in the order in which the ranks exchange them."""
MARGIN_SHARE = 0.9
"""The margin of predicted times covers this share of the steps."""


def make_policy(config: ShiftConfig, costs: CostModel | None, chunk: int) -> ShiftPolicy:
    """Make the policy that ``config`` names.

    Args:
        config: The settings.
        costs: The cost model. Without it, ``calibrated`` becomes ``queue-depth``.
        chunk: Prompt tokens that one step computes at most.

    Raises:
        Refused: the user's policy cannot be loaded.
    """
    if config.policy in MODES:
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
class Decision:
    """The decision for one step.

    Attributes:
        step: The state that the policy saw.
        mode: The mode of the step.
        switched: Whether the policy chose another mode than for the step before. Steps that the policy did not choose
            do not count.
        probe: Whether the step runs in a mode that the policy did not choose, to measure its time.
    """

    step: StepState
    mode: Mode
    switched: bool
    probe: bool = False


class ModeSelector:
    """Chooses the mode of each step. Its state depends on the steps alone, so it is the same on every rank.

    Attributes:
        policy: The policy.
        policy_text: The policy's description of itself.
        probes: Decides which steps are probes; None if the policy is not ``calibrated``.
        calibration: The calibration that predictions come from, or None.
        count: Number of steps so far.
        steps: Number of steps so far, by mode.
        tokens: Number of tokens so far, by mode.
        switches: Changes of mode so far, as the policy chose them.
        longest_probe: Predicted seconds of a probe at most, while requests decode.
    """

    def __init__(self, policy: ShiftPolicy) -> None:
        self.policy = policy
        self.calibration: Calibration | None = None
        self.count = 0
        self.steps = dict.fromkeys(MODES, 0)
        self.tokens = dict.fromkeys(MODES, 0)
        self.switches = 0
        self.longest_probe = math.inf
        self.previous_mode: Mode | None = None
        self.steps_since_switch = 0

    @property
    def policy(self) -> ShiftPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: ShiftPolicy) -> None:
        self._policy = policy
        # Stored, because ``describe`` can take milliseconds, and the text is read every second between steps.
        self.policy_text = policy.describe()
        self.probes = Probes(policy.costs) if isinstance(policy, Calibrated) else None

    def restart(self) -> None:
        """Forget the steps so far, but for the counters. The ranks of a new instance have seen different steps."""
        self.count, self.previous_mode, self.steps_since_switch = 0, None, 0

    @property
    def must_agree_on_drift(self) -> bool:
        """Whether all ranks must agree now, between two steps, on the argument of :meth:`set_doubts`."""
        return self.count % (2 * DRIFT_STEPS) == 0 and isinstance(self._policy, Calibrated)

    def set_doubts(self, doubts: dict[Doubt, float]) -> None:
        """Set how far the ratios of the modes' times are off. ``doubts`` must be the same on every rank."""
        if isinstance(self._policy, Calibrated) and self._policy.doubts != doubts:
            self._policy = replace(self._policy, doubts=doubts)

    def counters(self) -> dict[str, Any]:
        """Return steps and tokens by mode, and switches, as a JSON value."""
        return {
            "steps": {mode.value: n for mode, n in self.steps.items()},
            "tokens": {mode.value: n for mode, n in self.tokens.items()},
            "switches": self.switches,
        }

    def choose(self, step: StepState) -> Decision:
        """Choose the mode of ``step``. This fills in its ``previous_mode`` and ``steps_since_switch``.

        A step that needs TP gets TP, and the policy is not asked.
        """
        step = replace(step, previous_mode=self.previous_mode, steps_since_switch=self.steps_since_switch)
        decision = self._ask(step) if step.needs_tp is None else Decision(step, Mode.TP, switched=False)
        self.count += 1
        self.steps[decision.mode] += 1
        self.tokens[decision.mode] += step.num_tokens
        self.switches += decision.switched
        self.steps_since_switch = 0 if decision.switched else self.steps_since_switch + 1
        return decision

    def _ask(self, step: StepState) -> Decision:
        """Ask the policy, and keep its choice.

        If a user's policy fails, ``tokens`` replaces it for good. This happens on every rank in the same step.
        """
        try:
            chosen = self._policy.choose(step)
        except PolicyFailed as error:
            fallback = TokenThreshold(ShiftConfig.threshold)
            logger.error("sglang_shift: %s; from now on: %s", error, fallback.describe())
            self.policy = fallback
            return self._ask(step)
        switched = self.previous_mode not in (None, chosen)
        longest = self.longest_probe if step.num_running else math.inf
        probe = self.probes.probe_mode(step, chosen, switched, longest) if self.probes is not None else None
        self.previous_mode = chosen  # without the probe: a policy that keeps its mode must not follow a probe
        return Decision(step, probe or chosen, switched, probe is not None)

    def predict(self, step: StepState) -> dict[Mode, float]:
        """Return the predicted seconds in each mode; empty without a calibration."""
        if self.calibration is None:
            return {}
        return {mode: self.calibration.costs.predict(mode, step) for mode in MODES}


class Drift:
    """How far actual step times have moved from the predicted times. This is one rank's view, from its clock."""

    def __init__(self) -> None:
        self._ratios = {(phase, mode): deque[float](maxlen=DRIFT_STEPS) for phase in PHASES for mode in MODES}
        self._mode_ratios = {mode: deque[float](maxlen=DRIFT_STEPS) for mode in MODES}
        self._chunk_ratios = deque[float](maxlen=DRIFT_STEPS)

    def add_chunk(self, predicted: float, seconds: float) -> None:
        """Record a step whose prompt tokens were chosen by their predicted time."""
        if predicted > 0 and 0 < seconds < 3600:
            self._chunk_ratios.append(seconds / predicted)

    @property
    def margin(self) -> float:
        """The share of a bound on step times that predicted times may use, 1 or less.

        With it, :data:`MARGIN_SHARE` of the recorded chunks keep the bound. It is 1 until enough chunks have run.
        """
        if len(self._chunk_ratios) < MIN_STEPS:
            return 1.0
        ratios = sorted(self._chunk_ratios)
        return min(1.0, 1 / ratios[int(MARGIN_SHARE * (len(ratios) - 1))])

    def add(self, mode: Mode, predicted: float, seconds: float, phase: str = "decode") -> None:
        """Record a step. Times that a clock cannot have measured are ignored. A mixed step counts as a prefill."""
        if predicted > 0 and 0 < seconds < 3600:
            self._ratios["decode" if phase == "decode" else "prefill", mode].append(seconds / predicted)
            self._mode_ratios[mode].append(seconds / predicted)

    def ratio(self, mode: Mode) -> float | None:
        """Return the median of actual over predicted time of the last steps, or None if there are too few steps."""
        ratios = self._mode_ratios[mode]
        return median(ratios) if len(ratios) == DRIFT_STEPS else None

    def skew(self, phase: str, mode: Mode, other: Mode) -> float | None:
        """Return the factor by which the ratio of ``mode``'s time to ``other``'s time is off in ``phase``.

        The result is None until enough steps of both modes have run. This factor decides between the modes. It stays 1
        if something slows both modes by the same factor.
        """
        mine, theirs = self._ratios[phase, mode], self._ratios[phase, other]
        return median(mine) / median(theirs) if min(len(mine), len(theirs)) >= MIN_STEPS else None

    def skews(self) -> dict[Doubt, float | None]:
        """Return :meth:`skew` of every phase and every pair of modes. A pair has the order of the family."""
        return {(phase, *pair): self.skew(phase, *pair) for phase in PHASES for pair in combinations(MODES, 2)}

    @property
    def doubts(self) -> dict[Doubt, float]:
        """The share by which the predicted ratio of two modes is off, for each ratio that has drifted.

        The first mode of a pair is slower than predicted, relative to the second mode. A mode that has not run often
        enough to compare counts as predicted. The ratio then counts as off by :data:`DRIFT` at most, because the cause
        that slowed the mode that ran may slow both modes.
        """
        doubts = {}
        for (phase, mode, other), skew in self.skews().items():
            mine, theirs = (self._median_ratio(phase, m) or 1.0 for m in (mode, other))
            skew_factor = min(max(mine / theirs, 1 / DRIFT), DRIFT) if skew is None else skew
            if (factor := max(skew_factor, 1 / skew_factor)) >= DRIFT:
                slower = (mode, other) if skew_factor > 1 else (other, mode)
                doubts[phase, *slower] = factor - 1
        return doubts

    @property
    def drifted(self) -> bool:
        """Whether a mode's step times, or the ratio of two modes in a phase, are off by more than :data:`DRIFT`."""
        factors = [self.ratio(mode) for mode in MODES] + list(self.skews().values())
        return any(r is not None and max(r, 1 / r) > DRIFT for r in factors)

    def clear(self) -> None:
        """Forget all steps."""
        for ratios in (*self._ratios.values(), *self._mode_ratios.values(), self._chunk_ratios):
            ratios.clear()

    def _median_ratio(self, phase: str, mode: Mode) -> float | None:
        ratios = self._ratios[phase, mode]
        return median(ratios) if len(ratios) == DRIFT_STEPS else None
