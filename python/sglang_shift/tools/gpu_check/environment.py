"""What the figures depend on: GPUs, driver, versions. Nothing here makes a CUDA context."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sglang_shift.tools.nvidia_smi import nvidia_smi

PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers", "sglang_shift")


def gpus() -> int:
    """How many CUDA GPUs there are."""
    return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


def no_gpu() -> str:
    """Why there is none."""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"no CUDA GPU: PyTorch {torch.__version__}, built {built}, finds none"


def describe() -> dict[str, Any]:
    """GPUs with their driver, and versions; None where one is not installed as a package."""
    return {
        "GPUs": nvidia_smi("name,memory.total,driver_version"),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, nccl_version())),
        **{package: version_of(package) for package in PACKAGES},
    }


def nccl_version() -> tuple[int, ...]:
    """Of the NCCL that PyTorch has loaded, preloaded ones included; empty where it has none."""
    try:
        return tuple(torch.cuda.nccl.version())
    except (AttributeError, RuntimeError, TypeError):  # a PyTorch without NCCL
        return ()


def version_of(package: str) -> str | None:
    """An installed package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
