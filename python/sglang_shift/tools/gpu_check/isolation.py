"""This pytest plugin runs each check in its own process, so that no check can harm another.

A check may crash its process, hang in a kernel that no Python signal interrupts, or leave servers behind that hold the
GPU. pytest-forked and pytest-xdist are not enough: a forked process cannot use CUDA, and neither plugin ends the
processes that a test has started.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sglang_shift.tools.gpu_check import processes
from sglang_shift.tools.gpu_check.catalogue import MARKERS, Check
from sglang_shift.tools.gpu_check.record import Record, Status, read

MIN_START_SECONDS = 30.0
"""If less time than this is left, no check begins. The import of SGLang and PyTorch takes a part of this time."""

MARGIN_SECONDS = 2.0
"""Seconds from a check's limit until this process ends the check.

If pytest-timeout is installed, it ends the check before.
"""

SESSION = ("-c", "/dev/null", "--noconftest", "-p", "no:cacheprovider", "--capture=no")
"""Options of both pytest processes. They ignore all files of the folder in which the command runs."""

CRASH = "Fatal Python error"
"""The first words that pytest's faulthandler prints when the process crashes."""


@dataclass
class CheckResult:
    """How a check ended.

    Attributes:
        name: The name of the check.
        status: ``passed``, ``failed`` or ``skipped``.
        reason: Why the check failed or was skipped.
        seconds: How long the check took.
        record: What the check found, even if it failed half-way.
    """

    name: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    record: Record = field(default_factory=Record)


class Isolation:
    """The plugin, which replaces pytest's own way to run a test.

    Args:
        gpus: Number of GPUs of this machine.
        no_gpu: Why there is no GPU, if there is none.
        seconds: The time for all checks. After this time no check begins, and the check that runs is ended.
        out: A folder for the output and the findings of each check.
    """

    def __init__(self, gpus: int, no_gpu: str, seconds: float, out: Path) -> None:
        self._gpus, self._no_gpu, self._seconds, self._out = gpus, no_gpu, seconds, out
        self._deadline = time.monotonic() + seconds - processes.GRACE_SECONDS

    def pytest_configure(self, config: pytest.Config) -> None:
        """Register the markers."""
        for marker in MARKERS:
            config.addinivalue_line("markers", marker)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Function, nextitem: pytest.Item | None) -> bool | None:
        """Run a check. If the check cannot run, pytest itself skips it."""
        check, left = Check.of(item.function), self._deadline - time.monotonic()
        if reason := self._obstacle(check, left):
            item.add_marker(pytest.mark.skip(reason=reason))
            return None
        late = f"it took longer than {check.limit:.0f} s"
        if left < check.limit:
            late = f"the {self._seconds:.0f} s for all checks ended it; give more --minutes, or --only {check.name}"
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports(item, self._run(item, check.name, min(left, check.limit), late)):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _obstacle(self, check: Check, left: float) -> str:
        if not self._gpus:
            return self._no_gpu
        if self._gpus < check.gpus:
            return f"it needs {check.gpus} GPUs, and there is {self._gpus}"
        if left < MIN_START_SECONDS:
            return f"too little is left of the {self._seconds:.0f} s for all checks; give more --minutes"
        return ""

    def _run(self, item: pytest.Function, name: str, seconds: float, late: str) -> CheckResult:
        """Run a check for at most ``seconds``. Its output goes to ``<name>.log``."""
        start, lines, log = time.time(), self._out / f"{name}.jsonl", self._out / f"{name}.log"
        lines.unlink(missing_ok=True)
        command = child_command(item, lines, start + seconds)
        code = processes.run(command, seconds + MARGIN_SECONDS, log)
        record, end = read(lines)
        elapsed = time.time() - start
        if code is None or (end is not None and end.late):
            return CheckResult(name, "failed", late, elapsed, record)
        if end is None:
            return CheckResult(name, "failed", f"it ended with exit code {code}: {last_line(log)}", elapsed, record)
        return CheckResult(name, end.status, end.reason, elapsed, record)


def child_command(item: pytest.Function, lines: Path, until: float) -> Sequence[str]:
    """Return the command that runs one check: pytest with the plugin for such a process."""
    options = ("-q", "--no-header", "--tb=native", "-p", "sglang_shift.tools.gpu_check.child")
    arguments = (f"--record={lines}", f"--until={until}", f"--rootdir={item.path.parent}", f"{item.path}::{item.name}")
    return [sys.executable, "-m", "pytest", *SESSION, *options, *arguments]


def reports(item: pytest.Function, result: CheckResult) -> list[pytest.TestReport]:
    """Return the reports that tell pytest a check's result: a call and a teardown.

    After the teardown, junit's XML has all of a test.
    """
    reason = (str(item.path), item.location[1] or 0, result.reason) if result.status == "skipped" else result.reason
    notes = [("note", note) for note in result.record.notes]
    problems = [("problem", problem) for problem in result.record.problems]

    def report(outcome: Status, longrepr: Any, when: Literal["call", "teardown"], **more: Any) -> pytest.TestReport:
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, when, **more)

    return [
        report(result.status, reason or None, "call", duration=result.seconds, record=result.record),
        report("passed", None, "teardown", user_properties=[*notes, *problems]),
    ]


def last_line(log: Path) -> str:
    """Return the last line that a check printed before any report of a crash, and the path of the log."""
    printed = log.read_text(errors="replace").partition(CRASH)[0]
    lines = [line for line in printed.splitlines() if line.strip()]
    return f"{lines[-1].strip()[:200] if lines else 'it printed nothing'} ({log})"
