"""Runs a part of a check in ranks. If the part fails, this is recorded as a problem, and the check goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessException

from sglang_shift.tools.gpu_check.ranks import run_ranks
from sglang_shift.tools.gpu_check.record import Record


def run_or_record_problem(
    record: Record, label: str, function: Callable[..., Any], devices: list[str], backend: str, *args: Any
) -> Any:
    """Run a function in ranks, as :func:`run_ranks` does.

    If a rank fails, the result is None. The error is printed in full, and is recorded as a problem of ``label``.
    """
    try:
        return run_ranks(function, devices, backend, *args)
    except ProcessException as error:
        traceback.print_exc()
        record.problem(f"{label}: {short_error(str(error))}")
        return None


def short_error(text: str) -> str:
    """Shorten the error of a rank to what the rank raised.

    The text of an exception is two lines of introduction and a traceback. If the rank raised nothing, the text says
    how the process ended.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return " ".join(lines[2:] or lines)[:300]
