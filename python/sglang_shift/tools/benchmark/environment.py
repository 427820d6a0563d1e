"""Describes what the figures depend on: the machine, the versions and the model."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_config import text_config_of
from sglang_shift.tools.nvidia_smi import nvidia_smi


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, memory, GPUs and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "CPU": (models or [platform.processor()])[0],
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "GPUs": " + ".join(nvidia_smi("name")),
        "Python": platform.python_version(),
        **{package: version(package) for package in ("torch", "sglang", "sglang_shift")},
    }


def describe_model(path: str) -> dict[str, Any]:
    """Return what the workloads need to know of a model, from its configuration.

    Fields that its config.json lacks have the defaults of transformers.

    Returns:
        ``vocabulary`` and ``context``, in tokens.

    Raises:
        ShiftError: transformers cannot read the configuration, or a field is missing.
    """
    import sglang.srt.utils.hf_transformers  # noqa: F401 - it tells transformers about more types of models
    from transformers import AutoConfig

    try:
        config = text_config_of(AutoConfig.from_pretrained(path))
    except Exception as error:  # transformers raises errors of any type
        words = " ".join(str(error).split()).rstrip(".")
        raise ShiftError(
            f"--model-path {path}: its configuration cannot be read ({words}); give another model"
        ) from error
    return {"vocabulary": _size(path, config, "vocab_size"), "context": _size(path, config, "max_position_embeddings")}


def _size(path: str, config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ShiftError(f"--model-path {path}: its configuration has no {name}; give the model of a decoder")
    return value
