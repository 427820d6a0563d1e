"""Defines the policies of the package, and loads a user's policy (``module:Class``)."""

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
"""A phase and two modes. Relative to the second mode, the first mode is slower in this phase than predicted."""

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
    """Runs every step in one mode (``--shift-policy tp`` or ``sp``)."""

    mode: Mode

    def choose(self, step: StepState) -> Mode:
        return self.mode

    def describe(self) -> str:
        return f"every step in {self.mode.name}"


@dataclass(frozen=True)
class TokenThreshold(ShiftPolicy):
    """The paper's rule (arXiv 2509.16495, section 3.3): SP when the step has more than N tokens.

    Padding tokens count, so each CUDA graph belongs to one mode.
    """

    threshold: int

    def choose(self, step: StepState) -> Mode:
        return Mode.SP if step.padded_tokens > self.threshold else Mode.TP

    def describe(self) -> str:
        return f"SP for steps of more than {self.threshold} tokens, else TP"


@dataclass(frozen=True)
class QueueDepth(ShiftPolicy):
    """Chooses without step times, by the number of tokens and the depth of the queue.

    A step of more than ``threshold`` tokens runs in SP. Any other decode runs in TP, for two reasons. The depth of the
    queue does not say how many tokens a decode has. And a decode of few tokens can take several times as long in SP.
    Any other prefill runs in SP while the queue is deep, and in TP while it is short.

    The queue is the waiting requests, not the running requests. It becomes deep at ``enter_requests`` waiting
    requests or ``enter_tokens`` pending prompt tokens. It becomes short again below both ``leave_requests`` and
    ``leave_tokens``. In between, the mode does not change, so that noise near a limit does not change it all the time.

    Attributes:
        threshold: A step of more tokens than this runs in SP.
        enter_requests: The queue becomes deep at this number of waiting requests.
        leave_requests: The queue becomes short below this number of waiting requests.
        enter_tokens: The queue becomes deep at this number of pending prompt tokens.
        leave_tokens: The queue becomes short below this number of pending prompt tokens.
    """

    threshold: int = ShiftConfig.threshold
    enter_requests: int = ShiftConfig.enter_requests
    leave_requests: int = ShiftConfig.leave_requests
    enter_tokens: int = ShiftConfig.enter_tokens
    leave_tokens: int = ShiftConfig.leave_tokens

    def choose(self, step: StepState) -> Mode:
        if step.padded_tokens > self.threshold:
            return Mode.SP
        return self.by_depth(step) if step.num_prefill_tokens else Mode.TP

    def by_depth(self, step: StepState) -> Mode:
        """Return SP if the queue is deep and TP if it is short.

        In between, return the mode of the step before, or TP for the first step.
        """
        requests, tokens = step.num_waiting, step.pending_prefill_tokens
        if requests >= self.enter_requests or tokens >= self.enter_tokens:
            return Mode.SP
        if requests < self.leave_requests and tokens < self.leave_tokens:
            return Mode.TP
        return step.previous_mode or Mode.TP

    def explain(self, step: StepState, mode: Mode) -> str:
        """Say whether the size of the step or the queue decided."""
        if step.padded_tokens > self.threshold or not step.num_prefill_tokens:
            return f"a {step.phase} step of {step.padded_tokens} tokens"
        return self.depth(step, mode)

    @staticmethod
    def depth(step: StepState, mode: Mode) -> str:
        """Describe the queue that led to ``mode``."""
        depth = f"{step.num_waiting} waiting, {step.pending_prefill_tokens} pending tokens"
        return f"{'deep' if mode is Mode.SP else 'short'} queue: {depth}"

    def describe(self) -> str:
        return (
            f"SP for steps of more than {self.threshold} tokens, and for other prefills from {self.enter_requests} "
            f"waiting requests or {self.enter_tokens} pending tokens on until they are below {self.leave_requests} "
            f"and {self.leave_tokens}; else TP"
        )


@dataclass(frozen=True)
class Calibrated(ShiftPolicy):
    """Chooses the mode with the lower predicted time, unless a change of mode costs more than it gains.

    If the predicted times of several modes cannot be told apart, the queue decides: SP while it is deep, TP while it
    is short. A time cannot be told apart from the lowest time in two cases. Either the difference is within twice the
    standard error of their ratio. Or it is within the drift that made the fastest mode slower than predicted.

    The calibration measures the cost of a change of mode. Usually it is zero, and then the mode chosen above runs.
    Otherwise a change must gain more than its cost:

    - In a prefill, this is the cost of one change. If more prompts are pending, the next step is a prefill of up to a
      chunk. If that step will run in the previous mode again, this is the cost of two changes.
    - In a decode, this is the cost of two changes, because another change follows for the next prefill. The cost is
      divided by the number of steps in the previous mode. The longer that mode has lasted, the longer the next mode
      will last (the ski-rental rule). If prompts are pending during a decode, they find no room. So decodes follow in
      this case too.

    Attributes:
        costs: The cost model, which predicts step times.
        chunk: Prompt tokens that one step computes at most (``--chunked-prefill-size``).
        doubts: By phase, mode and other mode, the share by which a ratio exceeds its prediction. The ratio is the
            mode's time over the other mode's time. The shares are the same on every rank. Without an entry, the
            prediction holds.
    """

    costs: CostModel
    chunk: int
    doubts: dict[Doubt, float] = field(default_factory=dict)

    def choose(self, step: StepState) -> Mode:
        times = self._times(step)
        best = self._best_mode(step, times)
        previous = step.previous_mode
        if previous is None or best is previous or not self.costs.switch_seconds:
            return best
        if not step.num_prefill_tokens:
            changes = 2 / (1 + step.steps_since_switch)
        elif step.pending_prefill_tokens and self._next_prefill_mode(step) is previous:
            changes = 2
        else:
            changes = 1
        return best if abs(times[previous] - times[best]) > changes * self.costs.switch_seconds else previous

    def _times(self, step: StepState) -> dict[Mode, float]:
        # Attention beyond the usual takes equally long in every mode. It decides nothing, so it is left out.
        return {mode: self.costs.seconds_without_long_attention(mode, step) for mode in MODES}

    def _best_mode(self, step: StepState, times: dict[Mode, float]) -> Mode:
        fastest, *tied = self._candidates(step, times)
        return deep if tied and (deep := QUEUE.by_depth(step)) in (fastest, *tied) else fastest

    def _candidates(self, step: StepState, times: dict[Mode, float]) -> list[Mode]:
        """Return the fastest mode, and all modes whose times cannot be told apart from its time."""
        phase, fastest = phase_of(step), min(times, key=times.__getitem__)
        lowest_seconds, candidates = times[fastest], [fastest]
        for mode, seconds in times.items():
            if mode is not fastest:
                tolerance = 2 * self.costs.ratio_error(phase, fastest, mode)
                # Only a doubt about the fastest mode counts. A doubt about the other mode favours the fastest mode.
                if self.doubts:
                    tolerance = max(tolerance, self.doubts.get((phase, fastest, mode), 0.0))
                if seconds - lowest_seconds <= tolerance * lowest_seconds:
                    candidates.append(mode)
        return candidates

    def _next_prefill_mode(self, step: StepState) -> Mode:
        return self.costs.faster("prefill", min(step.pending_prefill_tokens, self.chunk))

    def explain(self, step: StepState, mode: Mode) -> str:
        """State the predicted times, and the queue if it decides."""
        modes = sorted(MODES, key=lambda m: m is not mode)
        times = ", ".join(f"{m.name} {1e3 * self.costs.predict(m, step):.2f} ms" for m in modes)
        _, *tied = self._candidates(step, self._times(step))
        queue = QUEUE.depth(step, mode) if tied else f"{step.num_waiting} waiting"
        return f"{times} predicted for {step.num_tokens} tokens ({step.phase}), {queue}"

    def describe(self) -> str:
        """Name the numbers of tokens at which each phase changes mode."""
        return (
            "the faster mode by measured step times: "
            + "; ".join(
                f"{phase} " + ", ".join(f"{mode.name} from {tokens}" for tokens, mode in self.costs.crossovers(phase))
                for phase in PHASES
            )
            + " tokens on"
        )


class RankZeroPolicy(ShiftPolicy):
    """A user's policy: rank 0 asks it, and every rank follows the answer.

    So all ranks choose the same mode, whatever the policy looks at. If the policy fails, every rank learns that.

    Args:
        policy: The user's policy.
        is_rank_zero: Whether this rank is rank 0.
        broadcast: Returns on every rank the value with which rank 0 called it. Every rank calls it for every step.
    """

    FAILED = -1

    def __init__(self, policy: ShiftPolicy, is_rank_zero: bool, broadcast: Callable[[int], int]) -> None:
        self.policy, self.is_rank_zero, self.broadcast = policy, is_rank_zero, broadcast

    def choose(self, step: StepState) -> Mode:
        """Return the mode that rank 0 chose for ``step``.

        Raises:
            PolicyFailed: on rank 0, the user's policy raised an error or did not return a mode.
        """
        answer = self.FAILED
        if self.is_rank_zero:
            try:
                answer = MODES.index(Mode(self.policy.choose(step)))
            except Exception:  # whatever the user's code raises
                logger.exception("sglang_shift: %s failed", type(self.policy).__name__)
        answer = self.broadcast(answer)
        if answer == self.FAILED:
            raise PolicyFailed(f"{type(self.policy).__name__} failed on rank 0 of this replica")
        return MODES[answer]

    def explain(self, step: StepState, mode: Mode) -> str:
        return self.policy.explain(step, mode)

    def describe(self) -> str:
        """Return the user's line, or the name of the class if the policy cannot describe itself."""
        try:
            return str(self.policy.describe())
        except Exception as error:  # whatever the user's code raises
            return f"{type(self.policy).__name__} (it does not describe itself: {type(error).__name__}: {error})"


QUEUE = QueueDepth()
"""The policy that decides if two predicted times cannot be told apart."""


def load_policy(name: str) -> ShiftPolicy:
    """Import the user's policy ``module:Class``, and construct it without arguments.

    Raises:
        Refused: the policy cannot be imported or constructed, or it is not a :class:`ShiftPolicy`.
    """
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's module raises
        raise NOT_LOADED(policy=name, error=f"{type(error).__name__}: {error}") from error
    if not isinstance(policy, ShiftPolicy):
        raise NOT_A_POLICY(policy=name)
    return policy
