"""Which steps must run in TP, whatever the policy chooses: those with a request that only TP can serve.

Every rank has the same batch, so every rank finds the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class TpRule(NamedTuple):
    """A rule for steps that must run in TP.

    Attributes:
        reason: Why such a step must run in TP, for the events.
        holds: Whether SGLang's batch is such a step.
    """

    reason: str
    holds: Callable[[Any], bool]


ADAPTER = TpRule("a request has a LoRA adapter", lambda batch: any(req.lora_id is not None for req in batch.reqs))
IMAGES = TpRule(
    "a prompt has images",
    lambda batch: batch.forward_mode.is_extend() and any(req.multimodal_inputs is not None for req in batch.reqs),
)


def tp_rules(*, adapters: bool, images: bool) -> tuple[TpRule, ...]:
    """The rules of a server. A server that needs no rule spends no time on them.

    Args:
        adapters: Whether the server has LoRA adapters.
        images: Whether its prompts may have images.
    """
    return (ADAPTER,) * adapters + (IMAGES,) * images


def reason_for_tp(rules: Sequence[TpRule], batch: Any) -> str | None:
    """Why a step must run in TP; None if it can run in any mode.

    Args:
        rules: The rules of the server.
        batch: SGLang's batch, which is the same on every rank.
    """
    return next((rule.reason for rule in rules if rule.holds(batch)), None)
