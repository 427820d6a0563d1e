"""Checks for the tests of the GPU check's runner: each ends in its own way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from sglang_shift.tools.gpu_check.record import Record, Skip


def passes(record: Record) -> None:
    record.row(size=8, us=1.5)
    record.note("all is well")


def finds_problems(record: Record) -> None:
    record.row(size=8)
    record.problem("the first thing is wrong")
    record.problem("the second thing is wrong")


def raises(record: Record) -> None:
    record.row(size=16)
    raise RuntimeError("out of\nmemory")


def skips(record: Record) -> None:
    raise Skip("there is no kernel for this")


SLEEPS = "import time; time.sleep(1000)"


def server() -> int:
    """Start two processes, each in a session of its own, as servers and their ranks are; the second one's id."""
    second = f"subprocess.Popen([sys.executable, '-c', {SLEEPS!r}], start_new_session=True)"
    program = f"import subprocess, sys; print({second}.pid, flush=True); {SLEEPS}"
    first = subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(first.stdout.readline())


def crashes(record: Record) -> None:
    record.row(size=32, pid=server())
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(record: Record) -> None:
    record.row(pid=server())
    try:
        time.sleep(1000)
    finally:
        record.note("it could clean up")
