"""The outcomes as a table to read and as JSON to keep."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_shift.tools.gpu_check.runner import Outcome

FILE = "gpu_check.json"
WIDTH = 116
SHOWN = 5
"""Problems of a check in the table; the file has all."""

PASSED, FAILED, NOTHING_RAN = 0, 1, 2


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0: all that ran passed. 1: something failed. 2: nothing could run."""
    if any(outcome.status == "failed" for outcome in outcomes):
        return FAILED
    return PASSED if any(outcome.status == "passed" for outcome in outcomes) else NOTHING_RAN


def line(outcome: Outcome) -> str:
    """An outcome in the table, with what was found below it."""
    head = f"{outcome.name:<18} {outcome.status:<8} {outcome.seconds:6.1f} s"
    parts = [outcome.reason] if outcome.reason else []
    problems = [problem for problem in outcome.found.problems if not outcome.reason.startswith(problem)]
    parts += problems[:SHOWN]
    if len(problems) > SHOWN:
        parts.append(f"and {len(problems) - SHOWN} more in {FILE}")
    parts += outcome.found.notes
    return "\n".join([head.rstrip(), *(_indented(part) for part in parts)])


def _indented(text: str) -> str:
    """Wrapped, but for what is aligned already."""
    if "\n" in text:
        return textwrap.indent(text, "    ")
    return textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def totals(outcomes: Sequence[Outcome]) -> str:
    """How many passed, failed and were skipped."""
    counts = {status: sum(o.status == status for o in outcomes) for status in ("passed", "failed", "skipped")}
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """Columns of a small table, the first one to the left; its first row is the heading."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    )


def write(out: Path, environment: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the JSON; called after every check, so that what is done is kept."""
    checks = [
        {
            "name": o.name,
            "status": o.status,
            "reason": o.reason,
            "seconds": round(o.seconds, 2),
            "notes": o.found.notes,
            "problems": o.found.problems,
            "figures": o.found.rows,
        }
        for o in outcomes
    ]
    (out / FILE).write_text(json.dumps({"environment": environment, "checks": checks}, indent=1) + "\n")
