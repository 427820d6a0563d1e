"""Makes the environment for two ranks of SGLang on one GPU.

Our platform (:mod:`one_gpu_platform`) puts all ranks on one GPU. SGLang finds it by an entry point, as it finds every
out-of-tree platform. So a folder with such an entry point is put on the path of the ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_shift.tools.gpu_check.environment import nccl_version

NAME = "sglang_shift_one_gpu"
BACKEND_VARIABLE = "SGLANG_SHIFT_ONE_GPU_BACKEND"
"""The environment variable that holds the backend of the ranks' process groups."""

LEAST_NCCL = (2, 30)
"""The oldest NCCL that accepts two ranks on one GPU."""

METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n"
ENTRY_POINT = f"[sglang.srt.platforms]\n{NAME} = sglang_shift.tools.gpu_check.one_gpu_platform:activate\n"


def environment(backend: str, folder: Path) -> dict[str, str]:
    """Return environment variables for ranks that share a GPU.

    Args:
        backend: ``gloo``, whose collectives copy CUDA tensors through the host, or ``nccl``.
        folder: The folder for the entry point.

    Raises:
        pytest.skip.Exception: this NCCL does not accept two ranks on one GPU.
    """
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "SGLANG_PLATFORM": NAME,
        BACKEND_VARIABLE: backend,
        # With this variable, SGLang asks the platform for each rank's device.
        "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "1",
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }
    if backend == "gloo":
        # If SGLang finds no NCCL library, it makes no PyNccl, which older NCCLs would refuse.
        return variables | {"SGLANG_NCCL_SO_PATH": str(folder / "none")}
    return variables | nccl_environment()


def nccl_environment() -> dict[str, str]:
    """Return the variables with which NCCL accepts two ranks on one GPU.

    Raises:
        pytest.skip.Exception: this NCCL is too old.
    """
    if (version := nccl_version()) < LEAST_NCCL:
        pytest.skip(
            f"NCCL {'.'.join(map(str, version)) or '(none)'} refuses two ranks on one GPU; preload "
            f"{'.'.join(map(str, LEAST_NCCL))} or newer, and name it in SGLANG_NCCL_SO_PATH"
        )
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
