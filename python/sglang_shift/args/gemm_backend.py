"""Switch off the matrix products of SGLang that cannot read a slice of columns of a base weight."""

from __future__ import annotations

import logging
import os

import torch

from sglang_shift.errors import Refusal

logger = logging.getLogger(__name__)

SPLIT_K = "SGLANG_ENABLE_BF16_SPLITK_GEMM"
BLACKWELL = 10
"""Major compute capability of the GPUs on which SGLang uses split-K products."""
SPLIT_K_PRODUCTS = Refusal(
    SPLIT_K + "={value} cannot be combined with sequence parallelism: those products want weights that are not slices "
    "of larger ones; leave it out",
    "SGLang uses those products on Blackwell GPUs. In TP, the weights of O and down are slices of columns of the base "
    "weights.",
)


def adjust_gemm_backend(device: str, backend: str = "auto") -> None:
    """Switch off SGLang's split-K products, and warn about ``gemv``.

    In TP, the weights of O and down are slices of columns of their base weights. SGLang uses split-K products for few
    rows. Their FlashInfer kernels need packed weights. An environment variable switches them off, because every
    rank's process inherits the environment.

    All other products read weights with a row stride, or fall back to a product that does. ``gemv`` falls back for
    O and down. Packed weights for it would be a second copy. A log line says so, because a user who asks for ``gemv``
    expects it everywhere.

    Args:
        device: ``cuda``, ``cpu``, ...
        backend: ``--bf16-gemm-backend``.

    Raises:
        Refused: the user asked for split-K products.
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
