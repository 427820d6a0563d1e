"""The policies that come with the package, and the user's own by ``module:Class``."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from sglang_shift.config import ShiftConfig
from sglang_shift.cost.model import PHASES, CostModel, phase_of
from sglang_shift.errors import PolicyFailed, Refusal
from sglang_shift.modes import MODES, Mode, ShiftPolicy, StepState

logger = logging.getLogger(__name__)

Doubt = tuple[str, Mode, Mode]
"""A phase, a mode that has become slower there than predicted, and another one beside which it has."""

NOT_LOADED = Refusal(
    "--shift-policy {policy} cannot be loaded ({error}); give module:Class, importable from PYTHONPATH, with a "
    "constructor that needs no arguments",
    "Nothing would choose the modes.",
)
NOT_A_POLICY = Refusal(
    "--shift-policy {policy} is not a sglang_shift.modes.ShiftPolicy; derive it from that class",
    "The server asks for the modes by the methods of that class.",
)


@dataclass(frozen=True)
class FixedMode(ShiftPolicy):
    """Every step in one mode (``--shift-policy tp`` or ``sp``)."""

    mode: Mode

    def choose(self, step: StepState) -> Mode:
        """The fixed mode."""
        return self.mode

    def describe(self) -> str:
        """One line."""
        return f"every step in {self.mode.name}"


@dataclass(frozen=True)
class TokenThreshold(ShiftPolicy):
    """The paper's rule (arXiv 2509.16495, section 3.3): SP when the step has more than N tokens.

    Those that pad it to a CUDA graph count, so that each graph is of one mode.
    """

    threshold: int

    def choose(self, step: StepState) -> Mode:
        """SP above the threshold, else TP."""
        return Mode.SP if step.padded_tokens > self.threshold else Mode.TP

    def describe(self) -> str:
        """One line."""
        return f"SP for steps of more than {self.threshold} tokens, else TP"


@dataclass(frozen=True)
class QueueDepth(ShiftPolicy):
    """What can be said without step times: many tokens are SP, few of a decode TP, and else the queue decides.

    A step of more than ``threshold`` tokens is SP. Any other decode is TP: how deep the queue is says nothing of
    how many tokens a decode has, and with few of them SP can take several times as long. Any other prefill is SP
    while the queue is deep and TP while it is short.

    The queue is what waits, not what runs. It is deep from ``enter_requests`` waiting requests or
    ``enter_tokens`` pending prompt tokens on, and short again below both ``leave_requests`` and
    ``leave_tokens``. In between the mode stays what it was, so that noise at the border does not flap.

    Attributes:
        threshold: Tokens in a step above which it is SP.
        enter_requests: Waiting requests that make the queue deep.
        leave_requests: Waiting requests below which it is short again.
        enter_tokens: Pending prompt tokens that make the queue deep.
        leave_tokens: Pending prompt tokens below which it is short again.
    """

    threshold: int = ShiftConfig.threshold
    enter_requests: int = ShiftConfig.enter_requests
    leave_requests: int = ShiftConfig.leave_requests
    enter_tokens: int = ShiftConfig.enter_tokens
    leave_tokens: int = ShiftConfig.leave_tokens

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        if step.padded_tokens > self.threshold:
            return Mode.SP
        return self.by_depth(step) if step.num_prefill_tokens else Mode.TP

    def by_depth(self, step: StepState) -> Mode:
        """SP while the queue is deep, TP while it is short, in between the mode of the step before, at first TP."""
        requests, tokens = step.num_waiting, step.pending_prefill_tokens
        if requests >= self.enter_requests or tokens >= self.enter_tokens:
            return Mode.SP
        if requests < self.leave_requests and tokens < self.leave_tokens:
            return Mode.TP
        return step.previous_mode or Mode.TP

    def explain(self, step: StepState, mode: Mode) -> str:
        """Which threshold decided."""
        if step.padded_tokens > self.threshold or not step.num_prefill_tokens:
            return f"a {step.phase} step of {step.padded_tokens} tokens"
        return self.depth(step, mode)

    @staticmethod
    def depth(step: StepState, mode: Mode) -> str:
        """The queue that decided for ``mode``, in words."""
        depth = f"{step.num_waiting} waiting, {step.pending_prefill_tokens} pending tokens"
        return f"{'deep' if mode is Mode.SP else 'short'} queue: {depth}"

    def describe(self) -> str:
        """One line."""
        return (
            f"SP for steps of more than {self.threshold} tokens, and for other prefills from {self.enter_requests} "
            f"waiting requests or {self.enter_tokens} pending tokens on until they are below {self.leave_requests} "
            f"and {self.leave_tokens}; else TP"
        )


@dataclass(frozen=True)
class Calibrated(ShiftPolicy):
    """The mode with the lower predicted time, where leaving the previous one is worth its cost.

    Where the predicted times of several modes cannot be told apart from the lowest, the queue decides: SP while it is
    deep, TP while it is short. That is where they are within twice the standard error of their ratio, or within what
    the ratio has drifted by against the fastest one.

    What a change of mode costs was measured; mostly it is nothing, and then the mode so found is taken. Else
    a change must gain

    - in a prefill, that cost; with more prompts pending, the next step is a prefill of up to a chunk, and
      if that will run in the previous mode again, the cost of two changes;
    - in a decode, two changes (another will follow, for the next prefill) over the steps in the previous
      mode: the longer it has lasted, the longer the next one will (the ski-rental rule). A decode while
      prompts are pending means that they find no room, so that decodes follow there too.

    Attributes:
        costs: Predicted times.
        chunk: Prompt tokens that one step takes (``--chunked-prefill-size``).
        doubts: By phase, mode and other mode, by which share the ratio of the mode's time to the other's is above the
            predicted one; the same on every rank. Without an entry the prediction holds.
    """

    costs: CostModel
    chunk: int
    doubts: dict[Doubt, float] = field(default_factory=dict)

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        times = self._times(step)
        wanted = self._wanted(step, times)
        previous = step.previous_mode
        if previous is None or wanted is previous or not self.costs.switch_seconds:
            return wanted
        if not step.num_prefill_tokens:
            changes = 2 / (1 + step.steps_since_switch)
        elif step.pending_prefill_tokens and self._next(step) is previous:
            changes = 2
        else:
            changes = 1
        return wanted if abs(times[previous] - times[wanted]) > changes * self.costs.switch_seconds else previous

    def _times(self, step: StepState) -> dict[Mode, float]:
        # Without the attention that takes as long in every mode: it decides nothing.
        return {mode: self.costs.own(mode, step) for mode in MODES}

    def _wanted(self, step: StepState, times: dict[Mode, float]) -> Mode:
        fastest, *tied = self._candidates(step, times)
        return deep if tied and (deep := QUEUE.by_depth(step)) in (fastest, *tied) else fastest

    def _candidates(self, step: StepState, times: dict[Mode, float]) -> list[Mode]:
        """The fastest mode, and those that cannot be told apart from it."""
        phase, fastest = phase_of(step), min(times, key=times.__getitem__)
        least, found = times[fastest], [fastest]
        for mode, seconds in times.items():
            if mode is not fastest:
                unsure = 2 * self.costs.unsure(phase, fastest, mode)
                if self.doubts:  # of the one that has become slower than thought; the other is only better than thought
                    unsure = max(unsure, self.doubts.get((phase, fastest, mode), 0.0))
                if seconds - least <= unsure * least:
                    found.append(mode)
        return found

    def _next(self, step: StepState) -> Mode:
        return self.costs.faster("prefill", min(step.pending_prefill_tokens, self.chunk))

    def explain(self, step: StepState, mode: Mode) -> str:
        """The predictions, and the queue where it decides."""
        modes = sorted(MODES, key=lambda m: m is not mode)
        times = ", ".join(f"{m.name} {1e3 * self.costs.predict(m, step):.2f} ms" for m in modes)
        _, *tied = self._candidates(step, self._times(step))
        queue = QUEUE.depth(step, mode) if tied else f"{step.num_waiting} waiting"
        return f"{times} predicted for {step.num_tokens} tokens ({step.phase}), {queue}"

    def describe(self) -> str:
        """One line: where each phase changes mode."""
        return (
            "the faster mode by measured step times: "
            + "; ".join(
                f"{phase} " + ", ".join(f"{mode.name} from {tokens}" for tokens, mode in self.costs.crossovers(phase))
                for phase in PHASES
            )
            + " tokens on"
        )


class LedPolicy(ShiftPolicy):
    """A policy of the user's: rank 0 asks it, and every rank does what it answers there.

    So the ranks choose alike whatever it looks at, and all of them learn that it failed.

    Args:
        policy: The user's.
        leads: Whether this is rank 0.
        share: Returns what rank 0 called it with, on every rank; all call it for every step.
    """

    FAILED = -1

    def __init__(self, policy: ShiftPolicy, leads: bool, share: Callable[[int], int]) -> None:
        self.policy, self.leads, self.share = policy, leads, share

    def choose(self, step: StepState) -> Mode:
        """Rank 0's mode of ``step``.

        Raises:
            PolicyFailed: the user's policy raised an error on rank 0, or did not answer with a mode there.
        """
        answer = self.FAILED
        if self.leads:
            try:
                answer = MODES.index(Mode(self.policy.choose(step)))
            except Exception:  # whatever the user's code raises
                logger.exception("sglang_shift: %s failed", type(self.policy).__name__)
        answer = self.share(answer)
        if answer == self.FAILED:
            raise PolicyFailed(f"{type(self.policy).__name__} failed on rank 0 of this replica")
        return MODES[answer]

    def explain(self, step: StepState, mode: Mode) -> str:
        """The user's."""
        return self.policy.explain(step, mode)

    def describe(self) -> str:
        """The user's line, or the name of the class where there is none to be had."""
        try:
            return str(self.policy.describe())
        except Exception as error:  # whatever the user's code raises
            return f"{type(self.policy).__name__} (it does not describe itself: {type(error).__name__}: {error})"


QUEUE = QueueDepth()
"""Decides where step times are not known well enough."""


def load_policy(name: str) -> ShiftPolicy:
    """The user's policy, ``module:Class``, constructed without arguments.

    Raises:
        Refused: there is no such module or class, or it is not a :class:`ShiftPolicy`.
    """
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's module raises
        raise NOT_LOADED(policy=name, error=f"{type(error).__name__}: {error}") from error
    if not isinstance(policy, ShiftPolicy):
        raise NOT_A_POLICY(policy=name)
    return policy
