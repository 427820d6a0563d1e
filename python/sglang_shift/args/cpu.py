"""Refuse flags for which SGLang, or our platform, has no code on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from sglang_shift.errors import Refusal
from sglang_shift.platforms.cpu import DRAFT_MODELS

DETERMINISTIC = Refusal(
    "--enable-deterministic-inference needs a GPU, and the device is cpu; leave it out",
    "SGLang has kernels whose sums do not depend on the batch for accelerators only.",
)
TREES = Refusal(
    "--speculative-eagle-topk {N} needs a GPU, and the device is cpu; give 1",
    "A draft model on a CPU proposes one token after the other, and no tree of tokens.",
)


def check_cpu(settings: Any) -> None:
    """Refuse what a rank could not start with on a CPU.

    Args:
        settings: A view of the resolved server arguments.

    Raises:
        Refused: the device is a CPU, and a flag needs a GPU; the error has the flag.
    """
    if settings.device != "cpu":
        return
    if settings.enable_deterministic_inference:
        raise DETERMINISTIC()
    topk = settings.speculative_eagle_topk or 1
    if topk > 1 and (settings.speculative_algorithm or "").upper() in DRAFT_MODELS:
        raise TREES(N=topk)
