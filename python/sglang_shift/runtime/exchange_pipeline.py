"""Decides which SP steps exchange their heads group by group (``--shift-exchange-pipeline``).

All ranks decide alike: the decision follows from the batch, and from a number of tokens that the ranks have agreed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_shift.parallel.exchange.head_groups import HeadGroups


@dataclass
class ExchangePipeline:
    """The rule of a rank.

    Attributes:
        groups: The groups of heads; None if the model cannot exchange group by group, or must not.
        first_tokens: A prefill in SP is pipelined if it has this number of tokens or more; None for no prefill.
        steps: The pipelined steps so far.
    """

    groups: HeadGroups | None = None
    first_tokens: int | None = None
    steps: int = 0

    @property
    def possible(self) -> bool:
        """Whether the model can exchange group by group."""
        return self.groups is not None

    def applies_to(self, batch: Any) -> bool:
        """Whether an SP step of SGLang's forward batch is pipelined.

        Decodes, drafts that are verified and CUDA graphs are not. Prefills are, also if they share a step with decodes.
        """
        if self.groups is None or self.first_tokens is None:
            return False
        prefills = batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED)
        return bool(prefills and batch.extend_num_tokens >= self.first_tokens)

    @contextmanager
    def starting_at(self, first_tokens: int | None) -> Iterator[None]:
        """Inside of this context, prefills are pipelined from another number of tokens on."""
        before, self.first_tokens = self.first_tokens, first_tokens
        try:
            yield
        finally:
            self.first_tokens = before

    @property
    def text(self) -> str:
        """Which steps are pipelined, in words."""
        if self.groups is None or self.first_tokens is None:
            return "no step exchanges its heads group by group"
        return f"prefills of {self.first_tokens} tokens or more exchange their heads in {self.groups.count} groups"

    def report(self) -> dict[str, int | None]:
        """The rule and its steps, for ``/server_info``."""
        groups = 0 if self.groups is None else self.groups.count
        return {"groups": groups, "first_tokens": self.first_tokens, "steps": self.steps}
