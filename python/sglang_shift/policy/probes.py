"""Probes: a step now and then in a mode that was not chosen, so that its predicted times are checked as well."""

from __future__ import annotations

from sglang_shift.cost.model import PHASES, CostModel, phase_of
from sglang_shift.modes import MODES, Mode, StepState

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
        self._due = {(phase, mode): EVERY for phase in PHASES for mode in MODES}
        self._shortest = min(curve.values[0] for by_mode in costs.curves.values() for curve in by_mode.values())

    def due(self, step: StepState, chosen: Mode, switched: bool) -> Mode | None:
        """The mode in which ``step`` runs instead of ``chosen``; None if it is no probe. Asked for every step.

        Of several modes that are due, the one that has been due for longest runs, if it is not too dear. A step that
        switches is no probe: it would stay in the mode of the step before.
        """
        self._steps += 1
        phase = phase_of(step)
        self._due[phase, chosen] = self._steps + EVERY
        if switched:
            return None
        waiting = [mode for mode in MODES if self._due[phase, mode] <= self._steps]
        for mode in sorted(waiting, key=lambda mode: self._due[phase, mode]):
            affordable = self._affordable(step, chosen, mode)
            self._due[phase, mode] = self._steps + (EVERY if affordable else AGAIN)
            if affordable:
                return mode
        return None

    def _affordable(self, step: StepState, chosen: Mode, mode: Mode) -> bool:
        """Whether a probe of ``mode`` is within the share; its time is then counted as spent."""
        mine, theirs = self.costs.predict(chosen, step), self.costs.predict(mode, step)
        extra = max(0.0, theirs - mine) + 2 * self.costs.switch_seconds
        if theirs > NEAR * mine or self.extra + extra > SHARE * self._steps * self._shortest:
            return False
        self.extra += extra
        return True
