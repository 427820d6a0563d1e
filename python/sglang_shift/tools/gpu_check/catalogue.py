"""The checks of a module: its test functions, with what their markers and docstrings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

PREFIX = "test_"
MARKERS = (
    "gpus(count): the fewest GPUs that the check needs; 1 without it",
    "timeout(seconds): what the check may take, the start of its process counted",
)
"""For pytest, with or without pytest-timeout."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: As in ``--only``.
        text: What it shows, in a line: its docstring.
        limit: Seconds that it may take: its marker ``timeout``.
        gpus: The fewest that it needs: its marker ``gpus``, or 1.
    """

    name: str
    text: str
    limit: float
    gpus: int

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Check:
        """What a test function says."""
        marks = {mark.name: mark.args[0] for mark in getattr(function, "pytestmark", ())}
        text = (function.__doc__ or "").strip().splitlines()
        return cls(name_of(function.__name__), text[0] if text else "", marks["timeout"], marks.get("gpus", 1))

    @property
    def function(self) -> str:
        """The name of its test function."""
        return PREFIX + self.name.replace("-", "_")


def name_of(function: str) -> str:
    """The name of the check that a test function is."""
    return function.removeprefix(PREFIX).replace("_", "-")


def checks_of(module: ModuleType) -> list[Check]:
    """All checks of a module, in its order."""
    return [Check.of(value) for name, value in vars(module).items() if name.startswith(PREFIX)]
