"""Two ranks of SGLang on one GPU: what their environment must say.

The ranks are told of by a platform of ours (:mod:`one_gpu_platform`), which SGLang finds as it finds every
out-of-tree platform, by an entry point: a folder with one is put on their path.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_shift.tools.gpu_check.environment import nccl_version

NAME = "sglang_shift_one_gpu"
BACKEND_VARIABLE = "SGLANG_SHIFT_ONE_GPU_BACKEND"
"""Environment variable of the ranks: the backend of their process groups."""

LEAST_NCCL = (2, 30)
"""Older ones refuse two ranks on one GPU."""

METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n"
ENTRY_POINT = f"[sglang.srt.platforms]\n{NAME} = sglang_shift.tools.gpu_check.one_gpu_platform:activate\n"


def environment(backend: str, folder: Path) -> dict[str, str]:
    """Environment variables for ranks that share a GPU.

    Args:
        backend: ``gloo``, whose collectives take CUDA tensors by way of the host, or ``nccl``.
        folder: Where the entry point may be written.

    Raises:
        pytest.skip.Exception: this NCCL cannot.
    """
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "SGLANG_PLATFORM": NAME,
        BACKEND_VARIABLE: backend,
        # SGLang then asks the platform for each rank's device.
        "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "1",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }
    if backend == "gloo":
        # Without a library SGLang has no PyNccl, which older NCCLs would refuse.
        return variables | {"SGLANG_NCCL_SO_PATH": str(folder / "none")}
    return variables | nccl_environment()


def nccl_environment() -> dict[str, str]:
    """What lets NCCL have two ranks on a GPU.

    Raises:
        pytest.skip.Exception: it is too old.
    """
    if (found := nccl_version()) < LEAST_NCCL:
        pytest.skip(
            f"NCCL {'.'.join(map(str, found)) or '(none)'} refuses two ranks on one GPU; preload "
            f"{'.'.join(map(str, LEAST_NCCL))} or newer, and name it in SGLANG_NCCL_SO_PATH"
        )
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
