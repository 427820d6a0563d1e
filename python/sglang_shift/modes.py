"""The two modes of a step, and the interface of the policies that choose between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PENDING_REQUESTS = 64
"""Waiting requests whose tokens are counted: a queue of thousands must not cost a step its time."""


class Mode(StrEnum):
    """How one step (one forward of the model) runs."""

    TP = "tp"
    """Full tensor parallelism over all P ranks: lowest latency for few tokens."""

    SP = "sp"
    """Ulysses sequence parallelism over S ranks, TP over P/S: highest throughput for many."""

    @property
    def other(self) -> Mode:
        """The mode that this one is not."""
        return Mode.SP if self is Mode.TP else Mode.TP


@dataclass(frozen=True, slots=True)
class StepState:
    """What a policy may look at: state that is identical on every rank.

    Attributes:
        num_tokens: Tokens the step computes: new prompt tokens plus one per decoding request.
        num_prefill_tokens: New prompt tokens among them.
        num_running: Requests that hold KV cache and decode.
        num_waiting: Requests in the waiting queue.
        pending_prefill_tokens: Prompt tokens that wait for a later step: those of the waiting
            requests (the first 64 of them are counted, cached tokens included) and what is left of a
            chunked prompt.
        bucket: ``num_tokens`` padded to a size that CUDA graphs are captured for; ``num_tokens`` where there is none.
        kv_reads: Pairs of a query token and a KV-cache token that attention computes. For a decode
            step, the sum of the sequence lengths.
        previous_mode: Mode that was chosen for the step before; None for the first.
        steps_since_switch: Steps since the mode last changed.
        sp_bucket: ``num_tokens`` padded to the CUDA graph that the step would replay in SP; ``num_tokens`` where it
            would run eagerly.
    """

    num_tokens: int
    num_prefill_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    pending_prefill_tokens: int = 0
    bucket: int = 0
    kv_reads: int = 0
    previous_mode: Mode | None = None
    steps_since_switch: int = 0
    sp_bucket: int = 0

    @property
    def padded_tokens(self) -> int:
        """Tokens, padded as SGLang pads them."""
        return max(self.num_tokens, self.bucket)

    @property
    def phase(self) -> str:
        """``prefill``, ``decode``, or ``mixed`` for a step with both."""
        if self.num_prefill_tokens == 0:
            return "decode"
        return "prefill" if self.num_prefill_tokens == self.num_tokens else "mixed"


class ShiftPolicy:
    """Chooses the mode of a step.

    Subclass it for ``--shift-policy module:Class``; the class is constructed without arguments, in each rank.
    Rank 0's is asked, and all ranks do what it answers. Of the policies here, which cost no message between
    ranks, each rank has its own: they are pure functions of :class:`StepState`.
    """

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        raise NotImplementedError

    def explain(self, step: StepState, mode: Mode) -> str:
        """Why ``choose(step)`` is ``mode``, in a few words; asked for when the mode changes."""
        return f"{step.num_tokens} tokens ({step.phase}), {step.num_running} running, {step.num_waiting} waiting"

    def describe(self) -> str:
        """One line for the start-up log and the status page."""
        return type(self).__name__
