"""Ruff and mypy are clean, and imports point down the list of rooms (pyproject.toml)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import REPO


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "python", "kernels", "benchmark", "test", "scripts", "examples"],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_clean(command):
    program = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    done = subprocess.run(program, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
