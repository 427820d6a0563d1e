"""Which of SGLang's matrix products can read a TP shard that is a slice of columns of its base weight."""

from __future__ import annotations

import logging
import os

import torch

from sglang_shift.errors import Refusal

logger = logging.getLogger(__name__)

SPLIT_K = "SGLANG_ENABLE_BF16_SPLITK_GEMM"
BLACKWELL = 10
"""Major compute capability of the GPUs that SGLang uses split-K products on."""
SPLIT_K_PRODUCTS = Refusal(
    SPLIT_K + "={value} cannot be combined with sequence parallelism: those products want weights that are not slices "
    "of larger ones; leave it out",
    "SGLang uses those products on Blackwell GPUs. In TP, the weights of O and down are slices of columns of the base "
    "weights.",
)


def adjust_gemm_backend(device: str, backend: str = "auto") -> None:
    """Switch off what cannot: the split-K products for few rows, whose FlashInfer kernels want packed weights.

    Set in the environment, which every rank's process inherits. All other products take a row stride or
    fall back to one that does. So does ``gemv``, which is said, as who asks for it expects it everywhere: O and
    down could only keep it by a second copy of their weights.

    Args:
        device: ``cuda``, ``cpu``, ...
        backend: ``--bf16-gemm-backend``.

    Raises:
        Refused: split-K products were asked for.
    """
    if device == "cuda" and backend == "gemv":
        logger.warning(
            "sglang_shift: --bf16-gemm-backend gemv multiplies single rows by packed weights: in TP steps O and down, "
            "slices of columns of their base weights, use cuBLAS instead; QKV, gate_up and all of SP use gemv"
        )
    if device != "cuda" or torch.cuda.get_device_capability()[0] != BLACKWELL:
        return
    if os.environ.get(SPLIT_K, "0").lower() not in ("0", "false"):
        raise SPLIT_K_PRODUCTS(value=os.environ[SPLIT_K])
    os.environ[SPLIT_K] = "0"
    logger.info("sglang_shift: %s=0, as TP shards are slices of the base weights", SPLIT_K)
