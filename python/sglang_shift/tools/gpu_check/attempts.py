"""Parts of a check that need ranks: the failure of one is a problem, and the others go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessException

from sglang_shift.tools.gpu_check.ranks import run_ranks
from sglang_shift.tools.gpu_check.record import Record


def attempt(
    record: Record, label: str, function: Callable[..., Any], devices: list[str], backend: str, *args: Any
) -> Any:
    """As :func:`run_ranks`, but None where a rank fails: its error is a problem of ``label``, and printed in full."""
    try:
        return run_ranks(function, devices, backend, *args)
    except ProcessException as error:
        traceback.print_exc()
        record.problem(f"{label}: {in_short(str(error))}")
        return None


def in_short(text: str) -> str:
    """What a rank raised, of its traceback with two lines of introduction; or how it ended, if it raised nothing."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return " ".join(lines[2:] or lines)[:300]
