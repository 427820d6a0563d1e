"""Which exchange a deployment has: FlashInfer's on the GPUs of one node, else the collective one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from sglang_shift.errors import Refused
from sglang_shift.exchange import SequenceExchange
from sglang_shift.flashinfer_exchange import WORLD_SIZES, FlashInferExchange

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "flashinfer", "collective")


@dataclass(frozen=True)
class Operands:
    """The largest exchange of a deployment.

    Attributes:
        tokens: Of the largest step; a larger one goes the collective way.
        width: ``S * D``, the most columns of a token.
        dtype: Of activations.
    """

    tokens: int
    width: int
    dtype: torch.dtype


def why_not_flashinfer(device: str, sp_size: int, nodes: int) -> str | None:
    """Why FlashInfer's communicator cannot serve this deployment, or None where it can.

    Args:
        device: ``cuda``, ``cpu``, ...
        sp_size: S.
        nodes: Over which the ranks of an SP group are spread.
    """
    if device != "cuda":
        return f"it needs CUDA, and the device is {device}"
    if sp_size not in WORLD_SIZES:
        return f"it serves SP groups of {', '.join(map(str, WORLD_SIZES))} ranks, and --sp-size is {sp_size}"
    return f"it serves one node, and there are {nodes}" if nodes > 1 else None


def check_exchange(asked: str, device: str, sp_size: int, nodes: int) -> None:
    """Refuse a backend that was asked for and cannot be.

    Raises:
        Refused: with the reason.
    """
    why_not = why_not_flashinfer(device, sp_size, nodes)
    if asked == "flashinfer" and why_not:
        raise Refused(f"--shift-exchange flashinfer is not possible: {why_not}; give auto or collective")


def make_exchange(asked: str, group: Any, device: str, nodes: int, operands: Operands) -> SequenceExchange:
    """The exchange over ``group``. Collective: every rank of the group calls it, with the same arguments.

    Args:
        asked: One of :data:`BACKENDS`.
        group: The SP group.
        device: As in :func:`why_not_flashinfer`, as ``nodes``.
        nodes: See there.
        operands: What it must be large enough for.

    Raises:
        Refused: ``flashinfer`` was asked for and is not possible.
    """
    check_exchange(asked, device, group.world_size, nodes)
    if asked == "collective" or why_not_flashinfer(device, group.world_size, nodes):
        return SequenceExchange(group)
    try:
        # FlashInfer exchanges the ranks' outcomes before it returns: all fail, or none does.
        return FlashInferExchange(group, operands.tokens, operands.width, operands.dtype)
    except Exception as error:  # no NVML, no compiler, a group without NCCL: whatever its libraries raise
        problem = f"{type(error).__name__}: {error}"
        if asked == "flashinfer":
            raise Refused(
                f"--shift-exchange flashinfer failed ({problem}); give auto or collective, or mend its cause"
            ) from error
        logger.warning("sglang_shift: FlashInfer's exchange failed (%s); the collective one takes its place", problem)
        return SequenceExchange(group)
