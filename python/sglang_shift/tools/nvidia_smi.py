"""What nvidia-smi says of this machine's GPUs; no CUDA context is made."""

from __future__ import annotations

import shutil
import subprocess

LIMIT_SECONDS = 30.0


def nvidia_smi(fields: str) -> list[str]:
    """A line for each GPU; none if there is no nvidia-smi, or it fails, or does not answer."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_SECONDS)
    except subprocess.SubprocessError:
        return []
    return done.stdout.splitlines()
