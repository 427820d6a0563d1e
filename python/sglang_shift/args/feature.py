"""Defines a feature of SGLang's that is refused with our flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Feature(NamedTuple):
    """A feature of SGLang's that does not combine with one of ours.

    Attributes:
        name: What the user asks for.
        is_requested: Whether the settings ask for the feature.
        why: Why we cannot serve it.
    """

    name: str
    is_requested: Callable[[Any], bool]
    why: str
