"""The two modes of a step, and the policies that choose between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """How one step (one forward of the model) runs."""

    TP = "tp"
    """Full tensor parallelism over all P ranks: lowest latency for few tokens."""

    SP = "sp"
    """Ulysses sequence parallelism over S ranks, TP over P/S: highest throughput for many."""


@dataclass(frozen=True)
class StepState:
    """What a policy may look at: state that is identical on every rank.

    Attributes:
        num_tokens: Tokens the step computes: new prompt tokens plus one per decoding request.
        num_prefill_tokens: New prompt tokens among them.
        num_running: Requests that hold KV cache and decode.
        num_waiting: Requests in the waiting queue.
    """

    num_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int


class ShiftPolicy:
    """Chooses the mode of a step. A pure function of :class:`StepState`: every rank must agree."""

    def choose(self, step: StepState) -> Mode:
        """The mode of ``step``."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the start-up log."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedMode(ShiftPolicy):
    """Every step in one mode (``--shift-policy tp`` or ``sp``)."""

    mode: Mode

    def choose(self, step: StepState) -> Mode:
        """The fixed mode."""
        return self.mode

    def describe(self) -> str:
        """One line for the start-up log."""
        return f"every step in {self.mode.value.upper()}"


@dataclass(frozen=True)
class TokenThreshold(ShiftPolicy):
    """The paper's rule (arXiv 2509.16495, section 3.3): SP when the step has more than N tokens."""

    threshold: int

    def choose(self, step: StepState) -> Mode:
        """SP above the threshold, else TP."""
        return Mode.SP if step.num_tokens > self.threshold else Mode.TP

    def describe(self) -> str:
        """One line for the start-up log."""
        return f"SP for steps of more than {self.threshold} tokens, else TP"


POLICIES = ("tokens", "tp", "sp")


def make_policy(name: str, threshold: int) -> ShiftPolicy:
    """The policy that ``--shift-policy name`` stands for.

    Raises:
        ValueError: ``name`` is none of :data:`POLICIES`.
    """
    if name == "tokens":
        return TokenThreshold(threshold)
    if name in (Mode.TP.value, Mode.SP.value):
        return FixedMode(Mode(name))
    raise ValueError(f"unknown --shift-policy {name!r}; choose from {', '.join(POLICIES)}")
