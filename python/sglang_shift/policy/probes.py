"""Probes: sometimes a step runs in a mode that the policy did not choose, to check the predicted times of this mode."""

from __future__ import annotations

import math

from sglang_shift.cost.model import PHASES, CostModel, phase_of
from sglang_shift.modes import MODES, Mode, StepState

PROBE_INTERVAL = 64
"""A probe of a mode is due if the mode has not run in a phase for this number of steps."""
RETRY_INTERVAL = 17
"""Steps to wait after a probe that was too expensive. A prime, so that steps of alternating kinds all get a turn."""
TIME_SHARE = 0.01
"""Probes may add this share of the time that is spent in steps, and no more."""
MAX_SLOWDOWN = 2.0
"""A mode is not probed if its predicted time is larger by this factor. Only drift of this size could make it faster."""


class Probes:
    """Decides which steps are probes, from steps and predicted times alone, so all ranks decide the same.

    The time that a probe adds is predicted. The time spent in steps is estimated as the number of steps times the
    shortest predicted step. So probes run first when the modes are close, and probes of expensive steps have to wait.

    Attributes:
        added_seconds: Predicted seconds that probes have added so far.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.added_seconds = 0.0
        self._steps = 0
        self._due_steps = {(phase, mode): PROBE_INTERVAL for phase in PHASES for mode in MODES}
        self._shortest = min(curve.values[0] for by_mode in costs.curves.values() for curve in by_mode.values())

    def probe_mode(self, step: StepState, chosen: Mode, switched: bool, longest: float = math.inf) -> Mode | None:
        """Return the mode in which ``step`` runs instead of ``chosen``, or None if it is no probe.

        A probe takes at most ``longest`` predicted seconds.

        Call it at every step. If several modes are due, they are tried in order, the longest due mode first. The first
        mode that is not too expensive runs. A step that switches is no probe, because it would stay in the mode of the
        step before.
        """
        self._steps += 1
        phase = phase_of(step)
        self._due_steps[phase, chosen] = self._steps + PROBE_INTERVAL
        if switched:
            return None
        waiting = [mode for mode in MODES if self._due_steps[phase, mode] <= self._steps]
        for mode in sorted(waiting, key=lambda mode: self._due_steps[phase, mode]):
            affordable = self._affordable(step, chosen, mode, longest)
            self._due_steps[phase, mode] = self._steps + (PROBE_INTERVAL if affordable else RETRY_INTERVAL)
            if affordable:
                return mode
        return None

    def _affordable(self, step: StepState, chosen: Mode, mode: Mode, longest: float) -> bool:
        """Return whether a probe of ``mode`` is short and fits into the share. If it does, count its time as spent."""
        chosen_seconds, probe_seconds = self.costs.predict(chosen, step), self.costs.predict(mode, step)
        added = max(0.0, probe_seconds - chosen_seconds) + 2 * self.costs.switch_seconds
        allowed = TIME_SHARE * self._steps * self._shortest
        if probe_seconds > min(longest, MAX_SLOWDOWN * chosen_seconds) or self.added_seconds + added > allowed:
            return False
        self.added_seconds += added
        return True
