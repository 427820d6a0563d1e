"""Defines a feature of SGLang's that is refused with our flags."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def first_requested(features: Iterable[Feature], settings: Any) -> Feature | None:
    """Return the first of the features that the settings (a view of the server arguments) ask for, or None."""
    return next((feature for feature in features if feature.is_requested(settings)), None)


def uses_lora(settings: Any) -> bool:
    """Whether the settings ask for LoRA adapters. SGLang sets ``--enable-lora`` later if only paths are given."""
    return bool(settings.enable_lora) or (settings.enable_lora is None and bool(settings.lora_paths))
