"""Server processes: started, asked, paused and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

from sglang_shift.errors import ShiftError

HOST = "127.0.0.1"
SHUTDOWN_S = 20
# Unless the caller says otherwise: a download is no part of a start-up time.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
LAUNCHER = (sys.executable, "-m", "sglang_shift.launch_server")


class Failure(ShiftError):
    """A server failed: one sentence, and the end of the log that explains it."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence if log is None else f"{sentence}; the end of {log}:\n{tail(log)}")


def call(url: str, body: Any = None, timeout: float = 60, text: bool = False) -> Any:
    """GET ``url``, or POST ``body`` to it; the JSON answered (None for an empty answer), or its text.

    Raises:
        OSError: nobody answers, or with an error.
        ValueError: the answer is not JSON.
    """
    key = os.environ.get("OPENAI_API_KEY")
    with requests.Session() as session:
        session.trust_env = False  # no proxy is between a server of this machine and us
        answer = session.request(
            "GET" if body is None else "POST", url, json=body, timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )  # fmt: skip
    answer.raise_for_status()
    return answer.content.decode() if text else json.loads(answer.content or "null")


class Server:
    """A server that runs, of one or more processes.

    Args:
        processes: Leaders of process groups, the first of which answers requests; none if it is not ours to end.
        url: Where it listens.
        log: What the first one prints.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]], url: str, log: Path | None) -> None:
        self.processes, self.url, self.log = processes, url, log

    def wait_until_healthy(self, timeout: float) -> None:
        """Return as soon as ``GET /health`` answers 200.

        Raises:
            Failure: a process ended instead, or ``timeout`` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive("while it started")
            with suppress(OSError):
                call(self.url + "/health", timeout=max(1, deadline - time.monotonic()), text=True)
                return
            time.sleep(0.1)
        raise Failure(f"the server was not healthy after {timeout:.0f} s (--timeout)", self.log)

    def check_alive(self, when: str, patience: float = 0) -> None:
        """Raise a Failure if a process has ended, or the first one does within ``patience`` seconds."""
        for rank, process in enumerate(self.processes):
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience if rank == 0 else 0)
            if (code := process.returncode) is not None:
                log = rank_log(self.log, rank) if rank and self.log else self.log
                raise Failure(f"the server ended with exit code {code} {when}", log)

    def flush(self) -> None:
        """Empty the prefix cache. Refused while a finished request is being cleaned up, so tried for a while.

        Raises:
            Failure: the server never did.
        """
        for _ in range(50):
            with suppress(OSError):
                call(self.url + "/flush_cache", body={}, text=True)
                return
            time.sleep(0.2)
        raise Failure("the server did not flush its cache", self.log)

    def pause(self) -> None:
        """Stop its processes where they are, so that they take nothing from another server."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on.

        Raises:
            Failure: the server does not answer any more.
        """
        self._signal(signal.SIGCONT)
        self.wait_until_healthy(60)

    def stop(self) -> None:
        """End the server and everything it started."""
        try:
            self._signal(signal.SIGCONT)
            for first in self.processes[:1]:  # none if it could not be started
                first.terminate()
                with suppress(subprocess.TimeoutExpired):
                    first.wait(SHUTDOWN_S)
        finally:
            self._signal(signal.SIGKILL)
            for process in self.processes:
                process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def start(flags: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None) -> Server:
    """Start ``sglang_shift.launch_server``.

    Args:
        flags: Its flags, other than where to listen.
        port: Where to listen; 0 takes a free port.
        log: Where its output goes.
        environment: Variables of its own, besides this process's.

    Raises:
        Failure: the port is in use.
    """
    port = claim_port(port)
    command = [*LAUNCHER, *flags, "--host", HOST, "--port", str(port)]
    return launch([(command, environment or {})], f"http://{HOST}:{port}", log)


def launch(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], url: str, log: Path) -> Server:
    """Start the processes of a server.

    Args:
        commands: Of each process, the first of which answers requests, and variables besides this process's.
        url: Where it will listen.
        log: Where the first one's output goes; those of the others are beside it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (command, own) in enumerate(commands):
            variables = OFFLINE | os.environ | dict(own)
            with (log if rank == 0 else rank_log(log, rank)).open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True
                    )
                )
    except BaseException:
        Server(processes, url, log).stop()
        raise
    return Server(processes, url, log)


@contextmanager
def serving(
    flags: Sequence[str], port: int, log: Path, timeout: float, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A healthy server; ended on the way out, whatever the reason.

    Args:
        flags: As in :func:`start`.
        port: As in :func:`start`.
        log: As in :func:`start`.
        timeout: Seconds it may take to start.
        environment: As in :func:`start`.

    Raises:
        Failure: it did not start.
    """
    server = start(flags, port, log, environment=environment)
    try:
        server.wait_until_healthy(timeout)
        yield server
    finally:
        server.stop()


def rank_log(log: Path, rank: int) -> Path:
    """The log of a rank that is a process of its own."""
    return log.with_suffix(f".rank{rank}.log")


def claim_port(port: int) -> int:
    """``port`` if nothing listens there, or for 0 one where nothing does.

    Raises:
        Failure: it is in use. (Checked here too: whoever is there might answer ``/health``.)
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Failure(f"--port {port}: {error.strerror}; choose another, or leave it out") from error
        return int(probe.getsockname()[1])


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a file."""
    with log.open(errors="replace") as file:
        return "".join(deque(file, lines))
