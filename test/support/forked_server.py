"""Servers whose processes are forked from one that has imported SGLang, and so need not import it again.

The import takes a process 13 s of a core. A server started by its command imports SGLang once, and so does each of its
ranks; one started here imports it never. The program, its flags and the ranks' code are the same. Servers that the
tests start without this (test_calibrated_server, test_small_pool and others) are the user's command to the letter.

    python test/support/forked_server.py {-m MODULE | FILE} [its arguments]

runs another program in this process, with forked ranks.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any
from unittest import mock

import setproctitle

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTS = [
    "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler", "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang_shift.args.server_args", "sglang_shift.runtime.scheduler", "sglang_shift.runtime.tokenizer_manager",
]  # fmt: skip


class ForkedProcess:
    """A program in a session of its own; as much of ``subprocess.Popen`` as the tests need."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        # Spawned ranks read their share of the cores from the environment; forked ones have torch's threads already.
        env = {"OMP_NUM_THREADS": "1", **env}
        with mock.patch.dict(os.environ, env):
            CONTEXT.set_forkserver_preload(IMPORTS)
            forkserver.ensure_running()
        self.process = CONTEXT.Process(target=run_as_command, args=(arguments, env, str(log)))
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


def run_as_command(arguments: list[str], env: dict[str, str], log: str) -> None:
    """In the forked process: what starting a command gives it, then the program."""
    os.setsid()
    setproctitle.setproctitle(" ".join(arguments))  # before the environment moves: ranks could not name themselves
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    tempfile.tempdir = None  # another TMPDIR counts
    # Its own tracker: what a killed server leaves behind goes with it.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    run_program(arguments)


def run_program(arguments: list[str]) -> None:
    """``python ARGUMENTS``, with forked ranks."""
    fork_ranks()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def fork_ranks() -> None:
    """SGLang sets the start method to "spawn" as it launches: take "fork" for it."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    set_start_method = multiprocessing.set_start_method

    def set_to_fork(method: str | None, force: bool = False) -> Any:
        return set_start_method("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = set_to_fork


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    run_program(sys.argv[1:])
