"""The errors a user sees: one sentence that says what was given, what is wrong and what to do."""

from __future__ import annotations

import sys
from dataclasses import dataclass


class ShiftError(RuntimeError):
    """A start-up problem, worded for the user.

    The launcher prints it and exits with code 2; where a rank raises it, SGLang logs it and stops the server.
    """


class Refused(ShiftError):
    """A combination that sglang_shift does not serve: refused at start-up, never served wrongly."""


@dataclass(frozen=True)
class Refusal:
    """One kind of refusal, declared beside the check that raises it. ``docs/refusals.md`` lists all of them.

    Attributes:
        message: The sentence for the user, with a ``{NAME}`` for each value.
        why: The reason, for that page.
    """

    message: str
    why: str

    def __call__(self, **values: object) -> Refused:
        """The error to raise, with the values filled in."""
        return Refused(self.message.format(**values))


class SeamError(ShiftError):
    """SGLang is not the one this package was written against, or a seam was not installed."""


class PolicyFailed(Exception):
    """A policy of the user's did not choose a mode; every rank knows it in the same step. One sentence."""


def print_error(error: Exception, program: str = "sglang_shift") -> int:
    """Print the sentence of an error that ends a command, on standard error; returns the exit code."""
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    return 2
