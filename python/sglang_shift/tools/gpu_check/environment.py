"""Describes what the figures depend on: GPUs, driver and versions. No function here makes a CUDA context."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sglang_shift.tools.nvidia_smi import nvidia_smi

PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers", "sglang_shift")


def gpus() -> int:
    """Return the number of CUDA GPUs."""
    return torch.cuda.device_count() if torch.version.cuda and torch.cuda.is_available() else 0


def no_gpu() -> str:
    """Return the reason why there is no GPU."""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"no CUDA GPU: PyTorch {torch.__version__}, built {built}, finds none"


def describe() -> dict[str, Any]:
    """Return the GPUs with their driver, and the versions. A version is None if the package is not installed."""
    return {
        "GPUs": nvidia_smi("name,memory.total,driver_version"),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, nccl_version())),
        **{package: version_of(package) for package in PACKAGES},
    }


def nccl_version() -> tuple[int, ...]:
    """Return the version of the NCCL that runs; empty if there is no NCCL.

    A preloaded NCCL says its version itself. ``torch.cuda.nccl.version`` returns the version with which PyTorch was
    built, even if another NCCL is preloaded (seen with PyTorch 2.11).
    """
    number = ctypes.c_int(0)
    with suppress(AttributeError):
        if ctypes.CDLL(None).ncclGetVersion(ctypes.byref(number)) == 0:
            return decode_nccl_version(number.value)
    try:
        return tuple(torch.cuda.nccl.version())
    except (AttributeError, RuntimeError, TypeError):  # a PyTorch without NCCL
        return ()


def decode_nccl_version(number: int) -> tuple[int, int, int]:
    """Return (2, 30, 7) for 23007. Before 2.9, NCCL used fewer digits: 2804 is 2.8.4 (``NCCL_VERSION`` in nccl.h)."""
    major = 1_000 if number < 10_000 else 10_000
    return number // major, number % major // 100, number % 100


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
