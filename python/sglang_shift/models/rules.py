"""Defines rules for the content of a ``config.json``. Each rule has its check, and its text in ``docs/models.md``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sglang_shift.models.families import FAMILIES, ORIGINAL_LENGTH, Family


@dataclass(frozen=True)
class Checkpoint:
    """The data that the rules check.

    Attributes:
        config: The model's Hugging Face configuration.
        context: Tokens of the longest sequence that is served.
    """

    config: Any
    context: int

    @property
    def family(self) -> Family:
        """The record of its family."""
        return FAMILIES[self.config.architectures[0]]

    @cached_property
    def rope(self) -> dict[str, Any]:
        """The parameters of the rope."""
        return getattr(self.config, "rope_parameters", None) or getattr(self.config, "rope_scaling", None) or {}

    @property
    def rope_type(self) -> Any:
        """The type of the rope, which SGLang looks for under two names."""
        return self.rope.get("rope_type", self.rope.get("type", "default"))

    @property
    def original_length(self) -> int:
        """Tokens of the training before the rope was scaled, as SGLang's class reads them."""
        outer, inner = getattr(self.config, ORIGINAL_LENGTH, None), self.rope.get(ORIGINAL_LENGTH)
        if ORIGINAL_LENGTH in self.family.rope_fields or inner is None:
            return outer or inner or self.config.max_position_embeddings
        return inner

    @property
    def length_ratio(self) -> float:
        """``max_position_embeddings`` over :attr:`original_length`."""
        return self.config.max_position_embeddings / self.original_length


Check = Callable[[Checkpoint], str | None]


@dataclass(frozen=True)
class Rule:
    """A rule for something that a ``config.json`` must not say.

    Attributes:
        subject: What the file must not say, for a table.
        reason: What SGLang does instead, as a sentence.
        way_out: What a user can do, as a sentence; empty if nothing can be done.
        concerns: Returns whether the rule applies to a family.
        check: Returns what is wrong with a checkpoint, in words that follow "config.json has", or None.
    """

    subject: str
    reason: str
    way_out: str
    concerns: Callable[[Family], bool]
    check: Check

    def problem(self, checkpoint: Checkpoint) -> str | None:
        """Return what is wrong with a checkpoint, or None."""
        return self.check(checkpoint) if self.concerns(checkpoint.family) else None


def rule(
    subject: str, reason: str, way_out: str = "", concerns: Callable[[Family], bool] = lambda family: True
) -> Callable[[Check], Rule]:
    """Make a rule from the check that follows. The arguments are the attributes of :class:`Rule`."""
    return lambda check: Rule(subject, reason, way_out, concerns, check)


def override(field: str, value: Any) -> str:
    """Return the flag that gives another value to a field of ``config.json``."""
    return f"--json-model-override-args '{json.dumps({field: value})}'"


def short(value: Any) -> str:
    """Return a value as text for a sentence, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
