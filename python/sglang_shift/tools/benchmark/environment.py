"""Describes what the figures depend on: the machine, the versions and the model."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

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
    """Return what the workloads need to know of a model, from its config.json.

    If the folder has no such file, Hugging Face's loader finds the configuration.

    Returns:
        ``vocabulary`` and ``context``, in tokens.
    """
    file = Path(path, "config.json")
    if file.exists():
        config = json.loads(file.read_text())
    else:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path).to_dict()
    config = config.get("text_config", config)
    return {"vocabulary": int(config["vocab_size"]), "context": int(config["max_position_embeddings"])}
