"""Defines the modes of a step, and the interface of a policy, which chooses a mode for each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

PENDING_REQUESTS = 64
"""The most waiting requests that count for ``pending_prefill_tokens``. A step has no time to count thousands."""


class Mode(StrEnum):
    """How one step (one forward of the model) runs.

    All code that keeps a value for each mode has a mapping by mode. So a new mode needs no new field elsewhere. The
    first mode is SGLang's own. The cost model compares the other modes with it, and chooses it if times are equal.
    """

    TP = "tp"
    """Full tensor parallelism over all P ranks. It has the lowest latency for few tokens."""

    SP = "sp"
    """Ulysses sequence parallelism over S ranks, with TP over P/S. It has the highest throughput for many tokens."""


MODES = tuple(Mode)
"""All modes, in order. A loop over the class itself takes ten times as long, and each step has such loops."""


@dataclass(frozen=True, slots=True)
class StepState:
    """The state that a policy may use. It is equal on every rank.

    Attributes:
        num_tokens: Tokens that the step computes: new prompt tokens, and ``width`` tokens for each decoding request.
        num_prefill_tokens: The new prompt tokens among ``num_tokens``.
        num_running: Requests that have a KV cache and decode.
        num_waiting: Requests in the waiting queue.
        pending_prefill_tokens: Prompt tokens that wait for a later step. These are the tokens of the first 64 waiting
            requests, with cached tokens, and the rest of a chunked prompt.
        padded: By mode, the tokens that the step computes in this mode. If it would replay a CUDA graph, this is
            ``num_tokens`` padded to the graph; if it would run eagerly, ``num_tokens``. For TP, ``num_tokens`` is
            padded to SGLang's sizes, whether or not TP has graphs of them. A mode that is not given is not padded.
        kv_reads: Pairs of a query token and a KV-cache token that attention computes. For a decode step of width 1,
            this is the sum of the sequence lengths.
        previous_mode: The mode that was chosen for the previous step; None for the first step.
        steps_since_switch: The steps since the mode last changed.
        width: Tokens of each decoding request: 1, or the drafts that speculative decoding verifies.
        needs_tp: Why the step must run in TP; None if any mode can run it. Policies see only steps of any mode.
        decode_kv_reads: The part of ``kv_reads`` that belongs to the decoding requests of a step with prompt tokens. It
            is 0 in any other step.
    """

    num_tokens: int
    num_prefill_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    pending_prefill_tokens: int = 0
    padded: Mapping[Mode, int] = field(default_factory=dict, hash=False)
    kv_reads: int = 0
    previous_mode: Mode | None = None
    steps_since_switch: int = 0
    width: int = 1
    needs_tp: str | None = None
    decode_kv_reads: int = 0

    def __post_init__(self) -> None:
        tokens, by_mode = self.num_tokens, self.padded
        complete = (
            {mode: max(tokens, by_mode.get(mode, 0)) for mode in MODES} if by_mode else dict.fromkeys(MODES, tokens)
        )
        object.__setattr__(self, "padded", complete)

    @property
    def padded_tokens(self) -> int:
        """``num_tokens``, padded as SGLang pads it in TP."""
        return self.padded[Mode.TP]

    @property
    def phase(self) -> str:
        """``prefill``, ``decode``, or ``mixed`` for a step with prompt tokens and decoding requests."""
        if self.num_prefill_tokens == 0:
            return "decode"
        return "prefill" if self.num_prefill_tokens == self.num_tokens else "mixed"


class ShiftPolicy:
    """Chooses the mode of a step.

    For ``--shift-policy module:Class``, write a subclass. Each rank constructs it without arguments. Only rank 0 asks
    its policy, and all ranks use the answer.

    The policies of this package are pure functions of :class:`StepState`. So each rank asks its own policy, without a
    message between ranks.
    """

    def choose(self, step: StepState) -> Mode:
        """Choose the mode of ``step``."""
        raise NotImplementedError

    def explain(self, step: StepState, mode: Mode) -> str:
        """Say in a few words why ``choose(step)`` is ``mode``. It is called when the mode changes."""
        return f"{step.num_tokens} tokens ({step.phase}), {step.num_running} running, {step.num_waiting} waiting"

    def describe(self) -> str:
        """Describe the policy in one line, for the start-up log and the status page."""
        return type(self).__name__
