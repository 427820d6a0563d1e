"""Decides how many prompt tokens a step takes, so that the requests that decode get their next token in time.

A target bounds the gap between two tokens of a request. The cost model says how long a step takes, so it also says how
many prompt tokens fit the target. The answer depends on values that are equal on every rank, and on no clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sglang_shift.cost.measure import kv_reads
from sglang_shift.cost.model import CostModel
from sglang_shift.modes import MODES, Mode, StepState

FLOOR = 512
"""A step takes this number of prompt tokens, if that many wait, even if it misses the target. So prompts progress."""

Padding = Callable[[bool, int], Mapping[Mode, int]]
"""Returns the padded tokens of a step by mode, as in :class:`StepState`, for whether it has prompts and its tokens."""


def no_padding(has_prompts: bool, tokens: int) -> Mapping[Mode, int]:
    """Return that no mode pads a step."""
    return {}


@dataclass(frozen=True, slots=True)
class Decodes:
    """The requests that decode while prompts are computed.

    Attributes:
        requests: Number of these requests.
        kv_reads: Their query-key pairs, as in :class:`StepState`.
        width: Tokens of each request, as in :class:`StepState`.
        mixed: Whether they share the step with the prompts. Otherwise, a decode step follows the step of the prompts.
    """

    requests: int = 0
    kv_reads: int = 0
    width: int = 1
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompt tokens that a step has so far.

    Attributes:
        tokens: Number of these tokens.
        kv_reads: Their query-key pairs, as in :class:`StepState`.
    """

    tokens: int = 0
    kv_reads: int = 0

    def plus(self, history: int, tokens: int) -> Prompts:
        """Return these tokens and ``tokens`` of another prompt, of which ``history`` tokens are in the KV cache."""
        return Prompts(self.tokens + tokens, self.kv_reads + kv_reads(history, tokens))


@dataclass(frozen=True)
class ChunkBudget:
    """Computes how many prompt tokens fit the target.

    A request that decodes waits for one step if the decodes share the step with the prompts. Otherwise, it waits for
    the step of the prompts and its own step. In both cases, this time must be at most ``target * margin``.

    Attributes:
        costs: The cost model.
        target: The longest gap between two tokens of a request, in seconds.
        margin: The share of the target that predicted times may use, because steps take longer than predicted.
        floor: A step takes at least this number of prompt tokens.
        modes: The modes that the policy chooses from. The fastest of them counts.
        padding: How the modes pad a step.
    """

    costs: CostModel
    target: float
    margin: float = 1.0
    floor: int = FLOOR
    modes: tuple[Mode, ...] = MODES
    padding: Padding = no_padding

    def room(self, prompts: Prompts, history: int, most: int, decodes: Decodes) -> int:
        """Return how many tokens of the next prompt the step takes: the fitting tokens, or more up to the floor.

        Args:
            prompts: The prompt tokens that the step has already.
            history: Tokens of the next prompt that are in the KV cache.
            most: The result is not larger.
            decodes: The requests that decode meanwhile. If there are none, the result is ``most``.
        """
        if not decodes.requests:
            return most
        floor = min(most, self.floor - prompts.tokens)
        return max(floor, self.fitting_tokens(prompts, history, most, decodes))

    def fitting_tokens(self, prompts: Prompts, history: int, most: int, decodes: Decodes) -> int:
        """Return the largest number of tokens of the next prompt, up to ``most``, that fit the target; maybe 0.

        If predicted times do not rise with the tokens, the result fits, but may not be the largest number that fits.
        """
        limit = self.prompt_seconds(decodes)

        def seconds(tokens: int) -> float:
            return self.step_seconds(prompts.plus(history, tokens), decodes)

        return bisect_right(range(1, most + 1), limit, key=seconds)

    def prompt_seconds(self, decodes: Decodes) -> float:
        """Return the seconds that a step with prompts may take. A decode step after it comes off the target."""
        limit = self.target * self.margin
        return limit if decodes.mixed or not decodes.requests else limit - self.decode_seconds(decodes)

    def step_seconds(self, prompts: Prompts, decodes: Decodes) -> float:
        """Return the predicted seconds of a step with prompts, in the fastest mode."""
        tokens, reads = prompts.tokens, 0
        if decodes.mixed:
            tokens, reads = tokens + decodes.requests, decodes.kv_reads
        step = StepState(
            tokens,
            prompts.tokens,
            padded=self.padding(True, tokens),
            kv_reads=prompts.kv_reads + reads,
            decode_kv_reads=reads,
        )
        return self.costs.fastest_seconds(step, self.modes)

    def decode_seconds(self, decodes: Decodes) -> float:
        """Return the predicted seconds of a decode step, in the fastest mode."""
        tokens = decodes.requests * decodes.width
        step = StepState(
            tokens,
            num_running=decodes.requests,
            padded=self.padding(False, tokens),
            kv_reads=decodes.kv_reads,
            width=decodes.width,
        )
        return self.costs.fastest_seconds(step, self.modes)
