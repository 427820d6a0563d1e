"""Lists the checks of a module. Each test function is a check; its markers and its docstring describe it."""

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
"""The markers that pytest must know, with or without pytest-timeout."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: The name for ``--only``.
        text: What the check shows: the first line of its docstring.
        limit: The most seconds that the check may take: its marker ``timeout``.
        gpus: The fewest GPUs that the check needs: its marker ``gpus``, or 1.
    """

    name: str
    text: str
    limit: float
    gpus: int

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Check:
        """Read a check from its test function."""
        marks = {mark.name: mark.args[0] for mark in getattr(function, "pytestmark", ())}
        text = (function.__doc__ or "").strip().splitlines()
        return cls(name_of(function.__name__), text[0] if text else "", marks["timeout"], marks.get("gpus", 1))

    @property
    def function(self) -> str:
        """The name of the check's test function."""
        return PREFIX + self.name.replace("-", "_")


def name_of(function: str) -> str:
    """Return the name of a check from the name of its test function."""
    return function.removeprefix(PREFIX).replace("_", "-")


def checks_of(module: ModuleType) -> list[Check]:
    """Return all checks of a module, in the order of its test functions."""
    return [Check.of(value) for name, value in vars(module).items() if name.startswith(PREFIX)]
