"""Checks for the tests of the GPU check's runner: each ends in its own way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from sglang_shift.gpu_check.record import Record, Skip


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


def crashes(record: Record) -> None:
    record.row(size=32)
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(record: Record) -> None:
    """Hangs with a process that it started in a session of its own, as servers are."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    record.row(pid=started.pid)
    try:
        time.sleep(1000)
    finally:
        record.note("it could clean up")
