"""Asks nvidia-smi about this machine's GPUs. This makes no CUDA context."""

from __future__ import annotations

import shutil
import subprocess

LIMIT_SECONDS = 30.0


def nvidia_smi(fields: str) -> list[str]:
    """Return a line for each GPU. There are no lines if nvidia-smi is missing, fails or does not answer."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS)
    except subprocess.SubprocessError:
        return []
    return done.stdout.splitlines()
