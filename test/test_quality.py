"""Ruff and mypy are clean, and every file is of a size that can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "python", "kernels", "benchmark", "test", "scripts", "examples"],
        ["mypy"],
    ],
    ids=" ".join,
)
def test_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_longer_than_300_lines():
    modules = [p for folder in ("python", "kernels") for p in (REPO / folder).rglob("*.py")]
    lengths = {str(p.relative_to(REPO)): len(p.read_text().splitlines()) for p in modules}
    assert {name: n for name, n in lengths.items() if n > 300} == {}
