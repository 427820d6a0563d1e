"""Runs a process that may crash, hang or leave other processes behind, and ends all of them."""

from __future__ import annotations

import ctypes
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GRACE_SECONDS = 20.0
"""Seconds that a process has to end after a signal. Then it is killed with all processes that it started."""

PR_SET_CHILD_SUBREAPER = 36
"""A constant of Linux, from ``linux/prctl.h``."""


def run(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """Run a command to its end, and end all processes that it has started.

    Args:
        command: The program and its arguments.
        seconds: The most seconds that the command may take, without :data:`GRACE_SECONDS`.
        log: The file for all that the command prints.

    Returns:
        The exit code of the command, or -N after signal N. It is None if the command took too long.
    """
    earlier_children = children()
    with log.open("wb") as out, adopting_orphans():
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process, earlier_children)


def stop(process: subprocess.Popen[bytes], earlier_children: set[psutil.Process]) -> None:
    """End a process in any state, and all processes that it has started. A server that stays would hold the GPU.

    Args:
        process: The process to end. It has :data:`GRACE_SECONDS` to end by itself. The processes that it leaves behind
            are killed for another :data:`GRACE_SECONDS`, until all of them are gone.
        earlier_children: Children that this process had before it started ``process``.
    """
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    process.kill()
    process.wait()
    deadline = time.monotonic() + GRACE_SECONDS
    while (orphans := children() - earlier_children) and time.monotonic() < deadline:
        for orphan in orphans:
            with suppress(psutil.NoSuchProcess):
                orphan.kill()
        psutil.wait_procs(orphans, timeout=1)  # their own children are now orphans, too


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Make this process the parent of all processes that a child leaves behind, for a ``with`` block.

    This holds for processes of any session.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def children() -> set[psutil.Process]:
    """Return the children of this process, without their children."""
    return set(psutil.Process().children())
