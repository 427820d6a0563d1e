"""What SP prefills gain if they exchange their heads group by group, as measured.

The gain rises with the tokens: messages and calls of attention cost a fixed time for each group, and what they hide is
in proportion to the tokens. So prefills are pipelined from some number of tokens on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from sglang_shift.cost.model import NotNegative, Positive, Tokens

MIN_GAIN = 0.01
"""A smaller gain counts as none: the logarithm of a ratio of times."""


@dataclass(frozen=True)
class ExchangeGain:
    """How much faster an SP prefill of some tokens is with the pipelined exchange than with the ordinary exchange.

    Attributes:
        tokens: Tokens of the prefill.
        seconds: The median time with the ordinary exchange.
        gain: The median logarithm of the ordinary time over the pipelined time.
        error: The standard error of ``gain``.
    """

    tokens: Tokens
    seconds: Positive
    gain: Annotated[float, Meta(ge=-100, le=100)]
    error: NotNegative

    @property
    def wins(self) -> bool:
        """Whether the pipelined exchange is faster, beyond the noise."""
        return self.gain > max(MIN_GAIN, 2 * self.error)


def first_tokens(gains: Sequence[ExchangeGain]) -> int | None:
    """Return the number of tokens from which the pipelined exchange wins at all shapes; None if it does not."""
    first = None
    for gain in sorted(gains, key=lambda each: -each.tokens):
        if not gain.wins:
            break
        first = gain.tokens
    return first
