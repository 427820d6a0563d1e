"""Finds the demo model that ships with the package. It is served if no ``--model-path`` is given."""

from __future__ import annotations

from pathlib import Path

from sglang_shift.errors import ShiftError


def demo_model_path() -> str:
    """Return the folder of the demo model.

    Raises:
        ShiftError: the package was installed without the demo model.
    """
    path = Path(__file__).parent.parent / "demo_model"
    if not (path / "config.json").is_file():
        raise ShiftError(
            f"the demo model is missing from {path}; give --model-path, or make it with scripts/train_demo_model.py"
        )
    return str(path)
