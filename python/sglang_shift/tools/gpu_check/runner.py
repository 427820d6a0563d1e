"""Runs the checks one after the other, each in a process of its own, and none because of another."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sglang_shift.tools.gpu_check.record import Record, read

GRACE_SECONDS = 20.0
"""For a check that is told to end, until it is killed with all that it started."""

LEAST_SECONDS = 30.0
"""With less time than this no check is begun: SGLang and PyTorch take some of it to be imported."""

PR_SET_CHILD_SUBREAPER = 36
"""Of Linux: ``linux/prctl.h``."""


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
    deadline = time.monotonic() + seconds - GRACE_SECONDS
    for check in checks:
        left = deadline - time.monotonic()
        if not gpus:
            yield Outcome(check.name, "skipped", no_gpu)
        elif gpus < check.gpus:
            yield Outcome(check.name, "skipped", f"it needs {check.gpus} GPUs, and there is {gpus}")
        elif left < LEAST_SECONDS:
            yield Outcome(
                check.name, "skipped", f"too little is left of the {seconds:.0f} s for all checks; give more --minutes"
            )
        elif left < check.limit:
            late = f"the {seconds:.0f} s for all checks ended it; give more --minutes, or --only {check.name}"
            yield run(check, left, late, out)
        else:
            yield run(check, check.limit, f"it took longer than {check.limit:.0f} s", out)


def run(check: Check, seconds: float, late: str, out: Path) -> Outcome:
    """Run one check. What it prints goes to ``<name>.log`` in ``out``.

    Args:
        check: The check.
        seconds: That it may take, :data:`GRACE_SECONDS` not counted.
        late: What to say if it takes longer.
        out: A folder.
    """
    start = time.monotonic()
    log, lines = out / f"{check.name}.log", out / f"{check.name}.jsonl"
    lines.unlink(missing_ok=True)
    others = children()
    with log.open("wb") as printed, adopting_orphans():
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_shift.tools.gpu_check.child", check.target, str(lines)],
            stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        in_time = True
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            stop(process, others)
    found, end = read(lines)
    if not in_time:
        end = {"status": "failed", "reason": late}
    elif end is None:
        end = {"status": "failed", "reason": f"it ended with exit code {process.returncode}: {last_line(log)}"}
    return Outcome(check.name, end["status"], end["reason"], time.monotonic() - start, found)


def stop(process: subprocess.Popen[bytes], others: set[psutil.Process], grace: float = GRACE_SECONDS) -> None:
    """End a check, however far it is, and all that it has started: a server would hold the GPU.

    Args:
        process: The check's.
        others: Children of this process from before the check.
        grace: Seconds for it to end by itself, and again for what it leaves behind to be gone.
    """
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    process.kill()
    process.wait()
    deadline = time.monotonic() + grace
    while (left := children() - others) and time.monotonic() < deadline:
        for orphan in left:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(left, timeout=1)  # what these have started are then orphans too


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Inside, processes that a check leaves behind become children of this one, whatever their session."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> set[psutil.Process]:
    """Of this process, theirs not counted."""
    return set(psutil.Process().children())


def last_line(log: Path) -> str:
    """The end of what a check printed, and where the rest is."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()[:200] if lines else 'it printed nothing'} ({log})"
