"""Probes: a step now and then in the mode that was not chosen, so that its predicted times are checked as well."""

from __future__ import annotations

from sglang_shift.cost.model import PHASES, CostModel, phase_of
from sglang_shift.modes import Mode, StepState

EVERY = 64
"""Steps for which a mode has not run in a phase before one is a probe of it."""
AGAIN = 17
"""Steps to wait after one that was too dear; a prime, so that steps that take turns all get theirs."""
SHARE = 0.01
"""Of the time that is spent in steps, what probes may take on top: at most this."""
NEAR = 2.0
"""A mode that is predicted to take this many times as long is not probed: drift would have to be as large."""


class Probes:
    """Says which steps are probes, from steps and predicted times alone: the same on every rank.

    What probes take on top is predicted, and what has been spent is taken for the number of steps times the
    shortest predicted one. So where the modes are close is probed first, and dear steps have to wait.

    Attributes:
        extra: Predicted seconds that probes have taken on top so far.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.extra = 0.0
        self._steps = 0
        self._due = {(phase, mode): EVERY for phase in PHASES for mode in Mode}
        self._shortest = min(curve.values[0] for curve in costs.curves.values())

    def due(self, step: StepState, chosen: Mode, switched: bool) -> bool:
        """Whether ``step``, for which ``chosen`` was chosen, runs in the other mode instead. Asked for every step.

        A step that switches is none: it would stay in the mode of the step before.
        """
        self._steps += 1
        phase = phase_of(step)
        other = chosen.other
        self._due[phase, chosen] = self._steps + EVERY
        if switched or self._steps < self._due[phase, other]:
            return False
        mine, theirs = self.costs.predict(chosen, step), self.costs.predict(other, step)
        extra = max(0.0, theirs - mine) + 2 * self.costs.switch_seconds
        if theirs > NEAR * mine or self.extra + extra > SHARE * self._steps * self._shortest:
            self._due[phase, other] = self._steps + AGAIN
            return False
        self.extra += extra
        self._due[phase, other] = self._steps + EVERY
        return True
