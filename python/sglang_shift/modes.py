"""The family of modes, one of which each step has, and the interface of the policies that choose one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

PENDING_REQUESTS = 64
"""Waiting requests whose tokens are counted: a queue of thousands must not cost a step its time."""


class Mode(StrEnum):
    """How one step (one forward of the model) runs.

    Whatever is kept for each mode is a mapping by mode, so a mode that is added here needs no field elsewhere. The
    first mode is SGLang's own. The cost model compares the others with it, and it is taken if times are equal.
    """

    TP = "tp"
    """Full tensor parallelism over all P ranks: lowest latency for few tokens."""

    SP = "sp"
    """Ulysses sequence parallelism over S ranks, TP over P/S: highest throughput for many."""


MODES = tuple(Mode)
"""The family in its order. To iterate over the class takes ten times as long, and each step does it."""


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
        padded: By mode, the tokens that the step computes there: ``num_tokens`` padded to the CUDA graph that it would
            replay in this mode, or ``num_tokens`` if it would run eagerly. For TP, the sizes are those that SGLang
            has graphs for, whether or not they are captured in TP. A mode that is not given is not padded.
        kv_reads: Pairs of a query token and a KV-cache token that attention computes. For a decode
            step, the sum of the sequence lengths.
        previous_mode: Mode that was chosen for the step before; None for the first.
        steps_since_switch: Steps since the mode last changed.
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

    def __post_init__(self) -> None:
        tokens, given = self.num_tokens, self.padded
        whole = {mode: max(tokens, given.get(mode, 0)) for mode in MODES} if given else dict.fromkeys(MODES, tokens)
        object.__setattr__(self, "padded", whole)

    @property
    def padded_tokens(self) -> int:
        """Tokens, padded as SGLang pads them."""
        return self.padded[Mode.TP]

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
