"""The policies that come with the package, and the user's own by ``module:Class``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from sglang_shift.cost_model import PHASES, CostModel
from sglang_shift.errors import Refused
from sglang_shift.modes import Mode, ShiftPolicy, StepState


@dataclass(frozen=True)
class FixedMode(ShiftPolicy):
    """Every step in one mode (``--shift-policy tp`` or ``sp``)."""

    mode: Mode

    def choose(self, step: StepState) -> Mode:
        """The fixed mode."""
        return self.mode

    def describe(self) -> str:
        """One line."""
        return f"every step in {self.mode.value.upper()}"


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
    """TP while the queue is short, SP while it is deep, with hysteresis; long prefills are SP at any depth.

    The queue is deep from ``enter_requests`` requests (waiting and running) or ``enter_tokens`` pending
    prompt tokens on, and short again below both ``leave_requests`` and ``leave_tokens``. In between the
    mode stays what it was, so that noise at the border does not flap.

    Attributes:
        threshold: Prompt tokens in a step above which it is a long prefill.
        enter_requests: Requests that make the queue deep.
        leave_requests: Requests below which it is short again.
        enter_tokens: Pending prompt tokens that make the queue deep.
        leave_tokens: Pending prompt tokens below which it is short again.
    """

    threshold: int = 256
    enter_requests: int = 32
    leave_requests: int = 16
    enter_tokens: int = 2048
    leave_tokens: int = 512

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        requests, tokens = step.num_waiting + step.num_running, step.pending_prefill_tokens
        if step.num_prefill_tokens > self.threshold or requests >= self.enter_requests or tokens >= self.enter_tokens:
            return Mode.SP
        if requests < self.leave_requests and tokens < self.leave_tokens:
            return Mode.TP
        return step.previous_mode or Mode.TP

    def explain(self, step: StepState, mode: Mode) -> str:
        """Which threshold decided."""
        if step.num_prefill_tokens > self.threshold:
            return f"a prefill of {step.num_prefill_tokens} tokens"
        depth = f"{step.num_waiting + step.num_running} requests, {step.pending_prefill_tokens} pending tokens"
        return f"{'deep' if mode is Mode.SP else 'short'} queue: {depth}"

    def describe(self) -> str:
        """One line."""
        return (
            f"SP from {self.enter_requests} requests or {self.enter_tokens} pending tokens on, TP again below "
            f"{self.leave_requests} and {self.leave_tokens}; SP for prefills of more than {self.threshold} tokens"
        )


@dataclass(frozen=True)
class Calibrated(ShiftPolicy):
    """The mode with the lower predicted time, where leaving the previous one is worth its cost.

    What a change of mode costs was measured; mostly it is nothing, and then the faster mode is taken. Else
    a change must gain

    - in a prefill, that cost; with more prompts pending, the next step is a prefill of up to a chunk, and
      if that will run in the previous mode again, the cost of two changes;
    - in a decode, two changes (another will follow, for the next prefill) over the steps in the previous
      mode: the longer it has lasted, the longer the next one will (the ski-rental rule). A decode while
      prompts are pending means that they find no room, so that decodes follow there too.

    Attributes:
        costs: Predicted times.
        chunk: Prompt tokens that one step takes (``--chunked-prefill-size``).
    """

    costs: CostModel
    chunk: int

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        tp, sp = self.costs.predict(Mode.TP, step), self.costs.predict(Mode.SP, step)
        faster = Mode.SP if sp < tp else Mode.TP
        previous = step.previous_mode
        if previous is None or faster is previous or not self.costs.switch_seconds:
            return faster
        if not step.num_prefill_tokens:
            changes = 2 / (1 + step.steps_since_switch)
        elif step.pending_prefill_tokens and self._next(step) is previous:
            changes = 2
        else:
            changes = 1
        return faster if abs(tp - sp) > changes * self.costs.switch_seconds else previous

    def _next(self, step: StepState) -> Mode:
        tokens = min(step.pending_prefill_tokens, self.chunk)
        prefill = self.costs.curves
        return Mode.SP if prefill["prefill", Mode.SP](tokens) < prefill["prefill", Mode.TP](tokens) else Mode.TP

    def explain(self, step: StepState, mode: Mode) -> str:
        """The predictions."""
        times = ", ".join(f"{m.value.upper()} {1e3 * self.costs.predict(m, step):.2f} ms" for m in (mode, mode.other))
        return f"{times} predicted for {step.num_tokens} tokens ({step.phase}), {step.num_waiting} waiting"

    def describe(self) -> str:
        """One line: where each phase changes mode."""
        return (
            "the faster mode by measured step times: "
            + "; ".join(
                f"{phase} "
                + ", ".join(f"{mode.value.upper()} from {tokens}" for tokens, mode in self.costs.crossovers(phase))
                for phase in PHASES
            )
            + " tokens on"
        )


POLICIES = ("calibrated", "queue-depth", "tokens", "tp", "sp")


def load_policy(name: str) -> ShiftPolicy:
    """The user's policy, ``module:Class``, constructed without arguments.

    Raises:
        Refused: there is no such module or class, or it is not a :class:`ShiftPolicy`.
    """
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's module raises
        raise Refused(
            f"--shift-policy {name} cannot be loaded ({type(error).__name__}: {error}); give module:Class, "
            "importable from PYTHONPATH, with a constructor that needs no arguments"
        ) from error
    if not isinstance(policy, ShiftPolicy):
        raise Refused(f"--shift-policy {name} is not a sglang_shift.modes.ShiftPolicy; derive it from that class")
    return policy
