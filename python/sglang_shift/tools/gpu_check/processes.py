"""A process that may crash, hang and leave others behind, and is ended with all of them."""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GRACE_SECONDS = 20.0
"""For a process that is told to end, until it is killed with all that it started."""

PR_SET_CHILD_SUBREAPER = 36
"""Of Linux: ``linux/prctl.h``."""


def run(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run a command to its end, and end all that it has started.

    Args:
        command: The program and its arguments.
        seconds: That it may take, :data:`GRACE_SECONDS` not counted.
        log: Where all that it prints goes.

    Returns:
        Its exit code, -N after signal N; None if it had to be ended.
    """
    others = children()
    with log.open("wb") as out, adopting_orphans():
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process, others)


def stop(process: subprocess.Popen[bytes], others: set[psutil.Process]) -> None:
    """End a process, however far it is, and all that it has started: a server would hold the GPU.

    Args:
        process: It has :data:`GRACE_SECONDS` to end by itself, and what it leaves behind as many to be gone.
        others: Children of this process from before.
    """
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    process.kill()
    process.wait()
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := children() - others) and time.monotonic() < deadline:
        for orphan in left:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(left, timeout=1)  # what these have started are then orphans too


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Inside, processes that a child leaves behind become children of this one, whatever their session."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> set[psutil.Process]:
    """Of this process, theirs not counted."""
    return set(psutil.Process().children())
