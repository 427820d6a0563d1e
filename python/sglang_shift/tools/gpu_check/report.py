"""Prints the results, and writes them as JSON after every check, so that no result is lost."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sglang_shift.tools.gpu_check.catalogue import name_of
from sglang_shift.tools.gpu_check.isolation import CheckResult
from sglang_shift.tools.gpu_check.record import Record

FILE = "gpu_check.json"
WIDTH = 116
MAX_PROBLEMS = 5
"""The most problems of a check in the table. The file has all problems."""

PASSED, FAILED, NOTHING_RAN = 0, 1, 2


class Reporter:
    """The pytest plugin that prints and keeps results, in place of pytest's terminal plugin.

    Args:
        out: The folder for the JSON.
        environment: What the figures depend on.

    Attributes:
        results: The results of the checks so far.
    """

    def __init__(self, out: Path, environment: dict[str, Any]) -> None:
        self._out, self._environment = out, environment
        self.results: list[CheckResult] = []
        write(out, environment, self.results)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep and print a result. A check that is skipped before it begins has no call."""
        if report.when == "call" or not report.passed:
            self.results.append(result_of(report))
            write(self._out, self._environment, self.results)
            print(line(self.results[-1]), flush=True)


def result_of(report: pytest.TestReport) -> CheckResult:
    """Return the check's result from a report of pytest."""
    reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else report.longreprtext
    name = name_of(report.nodeid.rpartition("::")[2])
    return CheckResult(name, report.outcome, reason, report.duration, getattr(report, "record", None) or Record())


def exit_code(results: Sequence[CheckResult]) -> int:
    """Return 0 if all checks that ran passed, 1 if a check failed, and 2 if no check could run."""
    if any(result.status == "failed" for result in results):
        return FAILED
    return PASSED if any(result.status == "passed" for result in results) else NOTHING_RAN


def line(result: CheckResult) -> str:
    """Return a result as it stands in the table, with the findings below it."""
    head = f"{result.name:<18} {result.status:<8} {result.seconds:6.1f} s"
    parts = [result.reason] if result.reason else []
    problems = [problem for problem in result.record.problems if not result.reason.startswith(problem)]
    parts += problems[:MAX_PROBLEMS]
    if len(problems) > MAX_PROBLEMS:
        parts.append(f"and {len(problems) - MAX_PROBLEMS} more in {FILE}")
    parts += result.record.notes
    return "\n".join([head.rstrip(), *(_indented(part) for part in parts)])


def _indented(text: str) -> str:
    """Indent a text. Wrap it unless it has several lines, which are aligned already."""
    if "\n" in text:
        return textwrap.indent(text, "    ")
    return textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def totals(results: Sequence[CheckResult]) -> str:
    """Say how many checks passed, failed and were skipped."""
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "skipped")}
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def write(out: Path, environment: dict[str, Any], results: Sequence[CheckResult]) -> None:
    """Write the JSON."""
    checks = [
        {
            "name": r.name,
            "status": r.status,
            "reason": r.reason,
            "seconds": round(r.seconds, 2),
            "notes": r.record.notes,
            "problems": r.record.problems,
            "figures": r.record.rows,
        }
        for r in results
    ]
    (out / FILE).write_text(json.dumps({"environment": environment, "checks": checks}, indent=1) + "\n")
