"""Starts, asks, pauses and ends server processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

import psutil
import requests

from sglang_shift.errors import ShiftError

HOST = "127.0.0.1"
SHUTDOWN_S = 20
OWN_PORTS = range(12000, 32000)  # below those of outgoing connections, and SGLang adds up to 1000 to some
LOWEST_PRIORITY = 19
# This holds unless the environment says otherwise, because a download must not count as start-up time.
OFFLINE = {"HF_HUB_OFFLINE": "1"}
LAUNCHER = (sys.executable, "-m", "sglang_shift.launch_server")


class Failure(ShiftError):
    """The failure of a server: one sentence, and the end of the log that explains it."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence if log is None else f"{sentence}; the end of {log}:\n{tail(log)}")


def call(url: str, body: Any = None, timeout: float = 60, text: bool = False) -> Any:
    """GET ``url``, or POST ``body`` to it. Return the JSON of the answer (None if it is empty), or its text.

    Raises:
        OSError: no server answers, or the answer is an error.
        ValueError: the answer is not JSON.
    """
    key = os.environ.get("OPENAI_API_KEY")
    with requests.Session() as session:
        session.trust_env = False  # a server of this machine needs no proxy
        answer = session.request(
            "GET" if body is None else "POST", url, json=body, timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )  # fmt: skip
    answer.raise_for_status()
    return answer.content.decode() if text else json.loads(answer.content or "null")


class Server:
    """A server that runs in one or more processes.

    Args:
        processes: Leaders of process groups. The first leader answers requests. The list is empty if somebody else
            started the server, and must end it.
        url: The address of the server.
        log: The output of the first process.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]], url: str, log: Path | None) -> None:
        self.processes, self.url, self.log = processes, url, log

    def wait_until_healthy(self, timeout: float) -> None:
        """Return as soon as ``GET /health`` answers 200.

        Raises:
            Failure: a process has ended, or ``timeout`` seconds have passed.
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
        """Raise a Failure if a process has ended, or if the first process ends within ``patience`` seconds."""
        for rank, process in enumerate(self.processes):
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience if rank == 0 else 0)
            if (code := process.returncode) is not None:
                log = rank_log(self.log, rank) if rank and self.log else self.log
                raise Failure(f"the server ended with exit code {code} {when}", log)

    def flush(self) -> None:
        """Empty the prefix cache. A server refuses while it cleans up a finished request, so this tries for a while.

        Raises:
            Failure: the server refused all the time.
        """
        for _ in range(50):
            with suppress(OSError):
                call(self.url + "/flush_cache", body={}, text=True)
                return
            time.sleep(0.2)
        raise Failure("the server did not flush its cache", self.log)

    def pause(self) -> None:
        """Stop the processes with SIGSTOP, so that they take no time from another server."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the processes go on.

        Raises:
            Failure: the server does not answer any more.
        """
        self._signal(signal.SIGCONT)
        self.wait_until_healthy(60)

    def lower_priority(self, title: str) -> None:
        """Give the processes of this title only the time that no other process of this machine wants."""
        for process in self.processes:
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if title in child.cmdline():
                        child.nice(LOWEST_PRIORITY)

    def memory(self) -> dict[str, int]:
        """Return the resident bytes of the first process and of all below it, by the names of the processes."""
        sizes: Counter[str] = Counter()
        root = psutil.Process(self.processes[0].pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                name = next((word for word in process.cmdline() if word.startswith("sglang::")), "launcher")
                sizes[name] += process.memory_info().rss
        return dict(sizes)

    def stop(self) -> None:
        """End the server and everything it started."""
        try:
            self._signal(signal.SIGCONT)
            for first in self.processes[:1]:  # the list is empty if no process could be started
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
        flags: The flags of the server, without ``--host`` and ``--port``.
        port: The port to listen on; 0 takes a free port.
        log: The file for the server's output.
        environment: Environment variables that are added to the variables of this process.

    Raises:
        Failure: the port is in use.
    """
    port = claim_port(port)
    command = [*LAUNCHER, *flags, "--host", HOST, "--port", str(port)]
    return launch([(command, environment or {})], f"http://{HOST}:{port}", log)


def launch(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], url: str, log: Path) -> Server:
    """Start the processes of a server.

    Args:
        commands: The command of each process, with environment variables that are added to the variables of this
            process. The first process answers requests.
        url: The address of the server.
        log: The file for the output of the first process. The logs of the other processes are beside it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, (command, variables) in enumerate(commands):
            environment = OFFLINE | os.environ | dict(variables)
            with (log if rank == 0 else rank_log(log, rank)).open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
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
    """Start a server, wait until it is healthy, and end it after the ``with`` block in any case.

    Args:
        flags: As in :func:`start`.
        port: As in :func:`start`.
        log: As in :func:`start`.
        timeout: Seconds that the start may take.
        environment: As in :func:`start`.

    Raises:
        Failure: the server did not start.
    """
    server = start(flags, port, log, environment=environment)
    try:
        server.wait_until_healthy(timeout)
        yield server
    finally:
        server.stop()


def rank_log(log: Path, rank: int) -> Path:
    """Return the log of a rank that has its own process."""
    return log.with_suffix(f".rank{rank}.log")


def free_port() -> int:
    """Return a port that is free now, and that the kernel gives to no outgoing connection.

    The program that it is for binds it seconds later, when it has imported SGLang. Until then, the kernel may give any
    port from 32768 on to a connection that somebody opens.
    """
    chooser = SystemRandom()  # processes that were forked, or seeded alike, must not choose alike
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = chooser.choice(OWN_PORTS)
            probe.bind(("", port))
            return port


def claim_port(port: int) -> int:
    """Return ``port`` if nothing listens on it. For 0, return :func:`free_port`.

    The server would notice a port in use, too. But the program that listens on it might answer ``/health``.

    Raises:
        Failure: the port is in use.
    """
    if port == 0:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Failure(f"--port {port}: {error.strerror}; choose another, or leave it out") from error
    return port


def tail(log: Path, lines: int = 25) -> str:
    """Return the last lines of a file."""
    with log.open(errors="replace") as file:
        return "".join(deque(file, lines))
