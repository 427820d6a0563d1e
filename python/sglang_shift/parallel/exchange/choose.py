"""Choose the exchange: FlashInfer's between GPUs with NVLink, gloo's on CPUs, otherwise the collective exchange."""

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
        tokens: The tokens of the largest step. A larger step uses the collective exchange.
        width: ``S * D``, the most columns of a token.
        dtype: The type of activations.
    """

    tokens: int
    width: int
    dtype: torch.dtype


def why_not_flashinfer(config: ShiftConfig, device: str, sp_size: int, nodes: int) -> str | None:
    """Why FlashInfer's communicator cannot serve this deployment, or None if it can.

    Args:
        config: The settings. Its S may not be final yet.
        device: ``cuda``, ``cpu``, ...
        sp_size: S.
        nodes: The number of nodes that have the ranks.
    """
    if config.exchange_dtype == "fp8":
        return "it sends activations as they are, and --shift-exchange-dtype is fp8"
    if device != "cuda":
        return f"it needs CUDA, and the device is {device}"
    if sp_size not in WORLD_SIZES:
        return f"it serves SP groups of {', '.join(map(str, WORLD_SIZES))} ranks, and --sp-size is {sp_size}"
    return f"it serves one node, and there are {nodes}" if nodes > 1 else None


def check_exchange(config: ShiftConfig, device: str, sp_size: int, nodes: int) -> None:
    """Refuse an exchange that the user asked for and that is not possible.

    The arguments are the same as for :func:`why_not_flashinfer`.

    Raises:
        Refused: the exchange, or fp8, is not possible; the error has the reason.
    """
    why_not = why_not_flashinfer(config, device, sp_size, nodes)
    if config.exchange == "flashinfer" and why_not:
        raise FLASHINFER(reason=why_not)
    if config.exchange_dtype == "fp8" and not kernels.fp8_supported(torch.device(device)):
        raise FP8(device=device)


def make_exchange(config: ShiftConfig, group: Any, device: str, nodes: int, operands: Operands) -> SequenceExchange:
    """Make the exchange over ``group``. Every rank of the group calls this, and all ranks get the same kind.

    Args:
        config: The settings.
        group: The SP group.
        device: ``cuda``, ``cpu``, ...
        nodes: The number of nodes that have the ranks.
        operands: The largest exchange that it must be able to do.

    Raises:
        Refused: the user asked for ``flashinfer`` or fp8, and it is not possible. All ranks raise it.
    """
    check_exchange(config, device, group.world_size, nodes)
    kind = GlooExchange if device == "cpu" else CollectiveExchange
    collective = kind(group, fp8=config.exchange_dtype == "fp8")
    if config.exchange == "collective":
        return collective
    level = logging.INFO if group.rank_in_group == 0 else logging.DEBUG  # all ranks of a group have the same reason
    if why_not := why_not_flashinfer(config, device, group.world_size, nodes):
        logger.log(level, "sglang_shift: The exchange uses collectives instead of FlashInfer: %s.", why_not)
        return collective
    problem = import_problem(group)
    if problem is None:
        try:
            # FlashInfer compares the outcomes of all ranks before it returns. So all ranks fail, or no rank does.
            flashinfer = FlashInferExchange(group, operands.tokens, operands.width, operands.dtype)
        except Exception as error:  # its libraries may raise any error: no compiler, a group without NCCL
            problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        if config.exchange == "flashinfer":
            raise FLASHINFER_FAILED(error=problem)
        logger.warning("sglang_shift: FlashInfer's exchange failed (%s); the collective one takes its place", problem)
        return collective
    if config.exchange == "auto" and not flashinfer.on_nvlink:
        # FlashInfer's NCCL path copies before and after each all-to-all, and calls torch.distributed in CUDA graphs.
        flashinfer.close()
        logger.log(level, "sglang_shift: The exchange uses collectives in place of %s.", flashinfer.text)
        return collective
    return flashinfer


def import_problem(group: Any) -> str | None:
    """Why a rank of ``group`` cannot import FlashInfer's communicator; None if all ranks can.

    All ranks get the same result. Building the communicator is a collective, so without this check the other ranks
    would wait without end for a rank that cannot import it.
    """
    try:
        import flashinfer.comm.ulysses  # noqa: F401

        problem = None
    except Exception as error:  # the import loads libraries, so it may raise more than ImportError
        problem = f"{type(error).__name__} on rank {group.rank_in_group}: {error}"
    return next(filter(None, group.all_gather_object(problem)), None)
