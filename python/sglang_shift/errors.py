"""The errors a user sees: one sentence that says what was given, what is wrong and what to do."""

from __future__ import annotations


class ShiftError(RuntimeError):
    """A start-up problem, worded for the user.

    The launcher prints it and exits with code 2; where a rank raises it, SGLang logs it and stops the server.
    """


class Refused(ShiftError):
    """A combination that sglang_shift does not serve: refused at start-up, never served wrongly."""


class SeamError(ShiftError):
    """SGLang is not the one this package was written against, or a seam was not installed."""


class PolicyFailed(Exception):
    """A policy of the user's did not choose a mode; every rank knows it in the same step. One sentence."""
