"""A server to measure, and ``sglang.bench_serving`` to measure it with; both as processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
SHUTDOWN_S = 20
NO_ANSWER = (OSError, HTTPException)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Offline unless the caller says otherwise: a download is no part of a start-up time.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"} | os.environ


class Failure(Exception):
    """The comparison cannot go on: one sentence, and the end of the log that explains it."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence if log is None else f"{sentence}; the end of {log}:\n{tail(log)}")


@dataclass(frozen=True)
class Load:
    """What one run of ``sglang.bench_serving`` sends: prompts of random tokens, all of one length.

    Attributes:
        name: How reports call it.
        requests: How many requests.
        input_len: Tokens of each prompt.
        output_len: Tokens each request generates, end-of-text or not.
        concurrency: Requests in flight at most; None sends all of them at once.
        figures: What to report of it, label to key in the results of ``bench_serving``.
    """

    name: str
    requests: int
    input_len: int
    output_len: int
    concurrency: int | None
    figures: dict[str, str]

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters of every request.

        Special tokens are made visible: ``bench_serving`` takes no notice of a token without text.
        """
        return {
            "temperature": 0,
            "max_new_tokens": self.output_len,
            "ignore_eos": True,
            "skip_special_tokens": False,
        }


class Server:
    """A running server.

    Args:
        process: Leader of the server's process group.
        url: Where it listens.
        log: What it prints.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def call(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        """GET ``path``, or POST ``body`` to it; the JSON answered, None for an empty answer.

        Raises:
            OSError, HTTPException: nobody answers, or with an error.
        """
        request = urllib.request.Request(self.url + path, headers={"Content-Type": "application/json"})
        request.data = None if body is None else json.dumps(body).encode()
        with DIRECT.open(request, timeout=timeout) as response:
            return json.loads(response.read() or "null")

    def wait_until_healthy(self, timeout: float) -> None:
        """Return as soon as ``GET /health`` answers 200.

        Raises:
            Failure: the server ended instead, or ``timeout`` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive("while it started")
            with suppress(*NO_ANSWER):
                self.call("/health", timeout=max(1, deadline - time.monotonic()))
                return
            time.sleep(0.1)
        raise Failure(f"the server was not healthy after {timeout:.0f} s (--timeout)", self.log)

    def check_alive(self, when: str, patience: float = 0) -> None:
        """Raise a Failure if the server has ended, or does so within ``patience`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(patience)
            raise Failure(f"the server ended with exit code {code} {when}", self.log)

    def shift_steps(self) -> dict[str, int] | None:
        """Steps so far by mode; None from stock SGLang, which has no modes."""
        state = self.call("/server_info")["internal_states"][0]
        return state["shift"]["steps"] if "shift" in state else None

    def warm_up(self, load: Load, timeout: float) -> None:
        """Serve the like of ``load`` once, as many requests at a time, and forget it.

        Raises:
            Failure: the server ended, or ``timeout`` seconds have passed.
        """
        tokens = random.Random(0)
        prompts = [tokens.choices(range(256), k=load.input_len) for _ in range(load.concurrency or load.requests)]
        try:
            self.call("/generate", {"input_ids": prompts, "sampling_params": load.sampling}, timeout)
        except NO_ANSWER as error:
            self.check_alive(f"while warming up ({load.name})", SHUTDOWN_S)
            raise Failure(f"warming up ({load.name}): {error}", self.log) from error

    def measure(self, load: Load, seed: int, timeout: float) -> dict[str, Any]:
        """Put ``load`` on the server, with an empty prefix cache.

        Returns:
            The results of ``bench_serving``, without its copy of ``/server_info``.

        Raises:
            Failure: a request failed, the server ended, or ``timeout`` seconds have passed.
        """
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", self.url]
        command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1"]
        command += ["--num-prompts", str(load.requests), "--random-input-len", str(load.input_len)]
        command += ["--random-output-len", str(load.output_len), "--seed", str(seed), "--flush-cache"]
        command += ["--extra-request-body", json.dumps({"sampling_params": load.sampling}), "--disable-tqdm"]
        if load.concurrency is not None:
            command += ["--max-concurrency", str(load.concurrency)]
        log, results = self.log.with_suffix(".bench.log"), self.log.with_suffix(".bench.jsonl")
        results.unlink(missing_ok=True)  # bench_serving appends
        command += ["--output-file", str(results)]
        try:
            with log.open("wb") as out:
                done = subprocess.run(
                    command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, timeout=timeout, check=False
                )
        except subprocess.TimeoutExpired:
            raise Failure(f"{load.name}: not done after {timeout:.0f} s (--timeout)", self.log) from None
        result: dict[str, Any] = json.loads(results.read_text()) if done.returncode == 0 else {}
        if result.get("completed") != load.requests:
            self.check_alive(f"under load ({load.name})", SHUTDOWN_S)
            raise Failure(f"{load.name}: bench_serving did not get its {load.requests} requests served", log)
        del result["server_info"]
        return result

    def stop(self) -> None:
        """End the server and everything it started."""
        try:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SHUTDOWN_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def serving(flags: list[str], port: int, log: Path, timeout: float) -> Iterator[Server]:
    """A healthy ``sglang_shift.launch_server``; ended on the way out, whatever the reason.

    Args:
        flags: Its flags, other than where to listen.
        port: Where to listen; 0 takes a free port.
        log: Where its output goes.
        timeout: Seconds it may take to start.

    Raises:
        Failure: it did not start.
    """
    port = claim_port(port)
    command = [sys.executable, "-m", "sglang_shift.launch_server", *flags, "--host", HOST, "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
        )
    server = Server(process, f"http://{HOST}:{port}", log)
    try:
        server.wait_until_healthy(timeout)
        yield server
    finally:
        server.stop()


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
