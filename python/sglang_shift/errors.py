"""Defines the errors that a user sees. Each message is one sentence: what was given, what is wrong, and what to do."""

from __future__ import annotations

import sys
from dataclasses import dataclass


class ShiftError(RuntimeError):
    """A start-up problem, with a sentence for the user.

    The launcher prints it, and exits with code 2. If a rank raises it, SGLang logs it and stops the server.
    """


class Refused(ShiftError):
    """A combination that sglang_shift does not serve. It refuses to start, because answers might be wrong."""


class InstanceRefused(Refused):
    """Something that instances cannot share.

    No server has instances yet, so ``docs/refusals.md`` does not list these errors.
    """


@dataclass(frozen=True)
class Refusal:
    """One kind of refusal, declared beside the check that raises it. ``docs/refusals.md`` lists all refusals.

    Attributes:
        message: The sentence for the user, with a ``{NAME}`` for each value.
        why: The reason, for ``docs/refusals.md``.
    """

    message: str
    why: str

    def __call__(self, **values: object) -> Refused:
        """The error to raise. Its message has the values in place of their names."""
        return Refused(self.message.format(**values))


class SeamError(ShiftError):
    """The seams do not fit the installed SGLang, or a seam is not in place."""


class RequestRefused(ValueError):
    """A request of an operator that would end a rank. The HTTP server answers it with status 400 and the sentence."""


class PolicyFailed(Exception):
    """A policy of the user did not choose a mode. Every rank raises it in the same step, with one sentence."""


def print_error(error: Exception, program: str = "sglang_shift") -> int:
    """Print the sentence of an error that ends a command to standard error, and return the exit code."""
    print(f"{program}: error: {error}", file=sys.stderr, flush=True)
    return 2
