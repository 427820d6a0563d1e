"""Provides checks for the tests of the GPU check's command. Each check ends in its own way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from sglang_shift.tools.gpu_check.ranks import run_ranks
from sglang_shift.tools.gpu_check.record import Record


@pytest.mark.timeout(60)
def test_passes(record: Record) -> None:
    """What a check shows."""
    record.row(size=8, us=1.5)
    record.note("all is well")


@pytest.mark.timeout(60)
def test_raises(record: Record) -> None:
    record.row(size=16)
    raise RuntimeError("out of\nmemory")


def rank(device: torch.device) -> int:
    return dist.get_world_size()


@pytest.mark.timeout(60)
def test_has_ranks(record: Record) -> None:
    record.row(ranks=run_ranks(rank, ["cpu", "cpu"], "gloo"))


SLEEPS = "import time; time.sleep(1000)"


def server() -> int:
    """Start two processes, each in its own session, like a server and its rank. Return the id of the second process."""
    second = f"subprocess.Popen([sys.executable, '-c', {SLEEPS!r}], start_new_session=True)"
    program = f"import subprocess, sys; print({second}.pid, flush=True); {SLEEPS}"
    first = subprocess.Popen(
        [sys.executable, "-c", program], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(first.stdout.readline())


@pytest.mark.timeout(60)
def test_crashes(record: Record) -> None:
    record.row(size=32, pid=server())
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.timeout(60)
def test_aborts(record: Record) -> None:
    record.note("so far, so good")
    print("terminate called after throwing an instance of 'c10::Error'", flush=True)
    os.abort()


@pytest.mark.timeout(60)
def test_skips(record: Record) -> None:
    pytest.skip("there is no kernel for this")


@pytest.mark.timeout(60)
def test_finds_problems(record: Record) -> None:
    record.row(size=8)
    record.problem("the first thing is wrong")
    record.problem("the second thing is wrong")


@pytest.mark.timeout(6)
def test_hangs(record: Record) -> None:
    record.row(pid=server())
    try:
        time.sleep(1000)
    finally:
        record.note("it could clean up")


@pytest.mark.timeout(60)
def test_hangs_long(record: Record) -> None:
    test_hangs(record)


@pytest.mark.timeout(6)
def test_hangs_in_a_kernel(record: Record) -> None:
    """No signal reaches Python in a kernel."""
    record.row(pid=server())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
    time.sleep(1000)


@pytest.mark.timeout(60)
def test_passes_too(record: Record) -> None:
    test_passes(record)


@pytest.mark.gpus(2)
@pytest.mark.timeout(60)
def test_needs_two(record: Record) -> None:
    test_passes(record)
