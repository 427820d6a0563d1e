"""Forks the processes of a server from a process that has imported SGLang, so that they need not import it again.

The import takes 13 s of a core in each process. A server that is started by its command imports SGLang once, and each
of its ranks imports it again. A server that is started here never imports it. The program, its flags and the ranks'
code are the same. Some tests (test_benchmark_smoke, test_small_pool and others) start a server by exactly the user's
command.

    python test/support/forked_server.py {-m MODULE | FILE} [its arguments]

This runs another program in this process, with forked ranks. A server then looks more often whether it is ready, and
whether it is told to end. It calibrates with fewer laps.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest import mock

import setproctitle

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = [
    "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_shift.args.server_args", "sglang_shift.runtime.scheduler", "sglang_shift.runtime.tokenizer_manager",
]  # fmt: skip


class ForkedProcess:
    """A server in its own session. It has the parts of ``subprocess.Popen`` that the tests need.

    A rank that asks for requests without a pause would take the core of the client, and of other tests. So it sleeps.
    """

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        # Spawned ranks read their share of the cores from the environment. Forked ranks have torch's threads already.
        env = {"OMP_NUM_THREADS": "1", **env}
        with mock.patch.dict(os.environ, env):
            CONTEXT.set_forkserver_preload(IMPORTS)
            forkserver.ensure_running()
        self.process = CONTEXT.Process(target=run_as_command, args=([*arguments, "--sleep-on-idle"], env, str(log)))
        self.process.start()
        self.pid: int = self.process.pid  # type: ignore[assignment]

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkedPopen(ForkedProcess):
    """Takes the place of ``subprocess.Popen`` where our tools start ``python ARGUMENTS`` with a log."""

    def __init__(self, command: Sequence[str], *, stdout: BinaryIO, env: dict[str, str], **_: Any) -> None:
        super().__init__(list(command[1:]), env, Path(stdout.name))


def run_as_command(arguments: list[str], env: dict[str, str], log: str) -> None:
    """Prepare a forked process like the process of a command, then run the program."""
    os.setsid()
    setproctitle.setproctitle(" ".join(arguments))  # before the environment moves, or ranks could not name themselves
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # multiprocessing has closed standard input. The HTTP workers of --tokenizer-worker-num open it by its number.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    tempfile.tempdir = None  # forgotten, so that another TMPDIR counts
    # The process gets its own tracker. It removes what a killed server leaves behind.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    run_program(arguments)


def run_program(arguments: list[str]) -> None:
    """Run ``python ARGUMENTS`` with forked ranks."""
    fork_ranks()
    save_time()
    look_often()
    calibrate_briefly()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def save_time() -> None:
    """Leave out what takes half of the time of a start, and is tested elsewhere. Forked ranks inherit it."""
    import torch._dynamo
    from sglang_shift.seams import check

    torch.set_num_threads(1)  # the threads of a forked process would not run
    torch._dynamo.config.disable = True  # on a CPU the platform's compiler changes nothing
    gc.freeze()  # SGLang collects garbage, and this process has inherited millions of objects
    check.check_sources = lambda: None  # type: ignore[assignment]


def fork_ranks() -> None:
    """Let SGLang fork its ranks. At launch it sets the start method to "spawn", which becomes "fork" here."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    set_start_method = multiprocessing.set_start_method

    def set_to_fork(method: str | None, force: bool = False) -> Any:
        return set_start_method("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = set_to_fork


def look_often() -> None:
    """Let a server look more often whether it is ready, and whether it is told to end.

    SGLang looks whether its own HTTP server answers once a second, and whether SIGTERM came once in five seconds. So
    each server would take some seconds in which nothing happens.
    """
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    http_server.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.25))})
    drain_and_end = TokenizerManager.sigterm_watchdog

    async def sigterm_watchdog(self: Any) -> None:
        while not self.gracefully_exit:
            await asyncio.sleep(0.2)
        await drain_and_end(self)

    TokenizerManager.sigterm_watchdog = sigterm_watchdog


def calibrate_briefly() -> None:
    """Let each shape of a calibration run for few laps. The times are less exact, and few tests depend on them."""
    from sglang_shift.cost import measure

    measure.SECONDS_A_MODE, measure.MAX_LAPS, measure.SWITCH_LAPS = 0.05, 3, 2


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    run_program(sys.argv[1:])
