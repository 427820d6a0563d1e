"""Which exchange a deployment has: FlashInfer's between GPUs with NVLink, gloo's on CPUs, else the collective one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import sglang_shift_kernels as kernels
import torch

from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refusal
from sglang_shift.parallel.exchange.base import SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.exchange.flashinfer import WORLD_SIZES, FlashInferExchange
from sglang_shift.parallel.exchange.gloo import GlooExchange

logger = logging.getLogger(__name__)

FLASHINFER = Refusal(
    "--shift-exchange flashinfer is not possible: {reason}; give auto or collective",
    f"FlashInfer's communicator serves SP groups of {', '.join(map(str, WORLD_SIZES))} ranks, with CUDA, on one node, "
    "and sends activations as they are.",
)
FLASHINFER_FAILED = Refusal(
    "--shift-exchange flashinfer failed ({error}); give auto or collective, or mend its cause",
    "A rank finds this out after loading. With auto, the collective exchange takes its place.",
)
FP8 = Refusal(
    "--shift-exchange-dtype fp8 is not possible: this {device} device cannot make e4m3, which takes an NVIDIA GPU of "
    "compute capability 8.9 or more; give auto",
    "Older GPUs have no instruction that makes e4m3. CPUs are served.",
)


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


def why_not_flashinfer(config: ShiftConfig, device: str, sp_size: int, nodes: int) -> str | None:
    """Why FlashInfer's communicator cannot serve this deployment, or None where it can.

    Args:
        config: The settings; S may not be known there yet.
        device: ``cuda``, ``cpu``, ...
        sp_size: S.
        nodes: Over which the ranks of an SP group are spread.
    """
    if config.exchange_dtype == "fp8":
        return "it sends activations as they are, and --shift-exchange-dtype is fp8"
    if device != "cuda":
        return f"it needs CUDA, and the device is {device}"
    if sp_size not in WORLD_SIZES:
        return f"it serves SP groups of {', '.join(map(str, WORLD_SIZES))} ranks, and --sp-size is {sp_size}"
    return f"it serves one node, and there are {nodes}" if nodes > 1 else None


def check_exchange(config: ShiftConfig, device: str, sp_size: int, nodes: int) -> None:
    """Refuse an exchange that was asked for and cannot be; the arguments are those of :func:`why_not_flashinfer`.

    Raises:
        Refused: with the reason.
    """
    why_not = why_not_flashinfer(config, device, sp_size, nodes)
    if config.exchange == "flashinfer" and why_not:
        raise FLASHINFER(reason=why_not)
    if config.exchange_dtype == "fp8" and not kernels.fp8_supported(torch.device(device)):
        raise FP8(device=device)


def make_exchange(config: ShiftConfig, group: Any, device: str, nodes: int, operands: Operands) -> SequenceExchange:
    """The exchange over ``group``. Collective: every rank of the group calls it, and all get the same kind.

    Args:
        config: The settings.
        group: The SP group.
        device: As in :func:`why_not_flashinfer`, as ``nodes``.
        nodes: See there.
        operands: What it must be large enough for.

    Raises:
        Refused: ``flashinfer`` was asked for and is not possible; on all ranks.
    """
    check_exchange(config, device, group.world_size, nodes)
    kind = GlooExchange if device == "cpu" else CollectiveExchange
    collective = kind(group, fp8=config.exchange_dtype == "fp8")
    if config.exchange == "collective":
        return collective
    if why_not := why_not_flashinfer(config, device, group.world_size, nodes):
        logger.info("sglang_shift: The exchange uses collectives instead of FlashInfer: %s.", why_not)
        return collective
    problem = import_problem(group)
    if problem is None:
        try:
            # FlashInfer exchanges the ranks' outcomes before it returns: all fail, or none does.
            flashinfer = FlashInferExchange(group, operands.tokens, operands.width, operands.dtype)
        except Exception as error:  # no compiler, a group without NCCL: whatever its libraries raise
            problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        if config.exchange == "flashinfer":
            raise FLASHINFER_FAILED(error=problem)
        logger.warning("sglang_shift: FlashInfer's exchange failed (%s); the collective one takes its place", problem)
        return collective
    if config.exchange == "auto" and not flashinfer.on_nvlink:
        # Its NCCL path copies before and after each all-to-all, and calls torch.distributed inside of CUDA graphs.
        flashinfer.close()
        logger.info("sglang_shift: The exchange uses collectives in place of %s.", flashinfer.text)
        return collective
    return flashinfer


def import_problem(group: Any) -> str | None:
    """Why FlashInfer's communicator cannot be imported on some rank of ``group``, the same on all; None where it can.

    Building it is collective: a rank that could not import it would be waited for without end.
    """
    try:
        import flashinfer.comm.ulysses  # noqa: F401

        problem = None
    except Exception as error:  # not only ImportError: it loads libraries
        problem = f"{type(error).__name__} on rank {group.rank_in_group}: {error}"
    return next(filter(None, group.all_gather_object(problem)), None)
