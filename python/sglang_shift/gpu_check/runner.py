"""Runs the checks one after the other, each in a process of its own, and none because of another."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sglang_shift.gpu_check.record import Record, read

GRACE_SECONDS = 20.0
"""For a check that is told to end, until it is killed with all that it started."""

LEAST_SECONDS = 10.0
"""With less time left than this no check is begun."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: As in ``--only``.
        text: What it shows, in a line.
        target: ``module:function``; the function takes a :class:`Record`, and may raise :class:`Skip`.
        limit: Seconds that it may take.
        gpus: The fewest that it needs.
    """

    name: str
    text: str
    target: str
    limit: float
    gpus: int = 1


@dataclass
class Outcome:
    """How a check ended.

    Attributes:
        name: Its name.
        status: ``passed``, ``failed`` or ``skipped``.
        reason: Why, unless it passed.
        seconds: How long it took.
        found: What it found, also where it failed half-way.
    """

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    found: Record = field(default_factory=Record)


def run_all(checks: Sequence[Check], gpus: int, no_gpu: str, seconds: float, out: Path) -> Iterator[Outcome]:
    """Run the checks in order; the outcome of each as soon as it is there.

    Args:
        checks: The checks.
        gpus: How many there are here.
        no_gpu: Why there is none, where there is none.
        seconds: For all of them: what has not begun by then is skipped, what runs is ended.
        out: A folder, for what each one prints.
    """
    deadline = time.monotonic() + seconds
    for check in checks:
        left = deadline - time.monotonic()
        if not gpus:
            yield Outcome(check.name, "skipped", no_gpu)
        elif gpus < check.gpus:
            yield Outcome(check.name, "skipped", f"it needs {check.gpus} GPUs, and there is {gpus}")
        elif left < LEAST_SECONDS:
            yield Outcome(check.name, "skipped", f"the {seconds:.0f} s for all checks are over; give more --minutes")
        else:
            yield run(check, min(left, check.limit), out)


def run(check: Check, seconds: float, out: Path) -> Outcome:
    """Run one check, for at most so many seconds. What it prints goes to ``<name>.log`` in ``out``."""
    start = time.monotonic()
    log, lines = out / f"{check.name}.log", out / f"{check.name}.jsonl"
    lines.unlink(missing_ok=True)
    with log.open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_shift.gpu_check.child", check.target, str(lines)],
            stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            stop(process)
    found, end = read(lines)
    if late:
        end = {"status": "failed", "reason": f"it took longer than {seconds:.0f} s"}
    elif end is None:
        end = {"status": "failed", "reason": f"it ended with exit code {process.returncode}: {last_line(log)}"}
    return Outcome(check.name, end["status"], end["reason"], time.monotonic() - start, found)


def stop(process: subprocess.Popen[bytes], grace: float = GRACE_SECONDS) -> None:
    """End a process that still runs, and all that it has started; nothing where it has ended."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        for descendant in started:
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
    process.kill()
    process.wait()


def last_line(log: Path) -> str:
    """The end of what a check printed, and where the rest is."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()[:200] if lines else 'it printed nothing'} ({log})"
