"""A rank of a server fails while instances merge: each request gets an answer or an error, and nothing hangs."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from harness import Answer, Server, surviving_processes

MODULE = [str(Path(__file__).resolve().parents[1] / "support" / "instance_fault_server.py")]
TWO = (
    "--dtype", "float32", "--tp-size", "2", "--instances", "2", "--max-total-tokens", "1024",
    "--max-running-requests", "16", "--sleep-on-idle",
)  # fmt: skip
pytestmark = [pytest.mark.server, pytest.mark.full]

NO_MEMORY = "rank 1 failed with OutOfMemoryError: planted: there is no memory"


def start(servers, faults: str, *flags: str) -> Server:
    server: Server = servers.get(*TWO, *flags, module=MODULE, env={"FAULTS": faults})
    return server


def merge(server: Server) -> requests.Response:
    return requests.post(server.url + "/shift/instances", json={"level": 2}, timeout=120)


def tokens_or_error(running: Future[Answer]) -> list[int] | None:
    """The tokens of a request; None if it ended with an error. A request that does not end fails the test."""
    try:
        return running.result(timeout=120).tokens
    except (requests.RequestException, AssertionError):
        return None


def end_in_a_merge(server: Server, reference) -> None:
    """Merge while requests run. One rank fails, so the server ends, and each request with its answer or an error."""
    ids = [reference.prompts[8 * i] for i in range(6)]
    with ThreadPoolExecutor(len(ids) + 1) as pool:
        running = [pool.submit(server.generate, each, 64) for each in ids]
        with pytest.raises(requests.RequestException):
            merge(server)
        ends = [tokens_or_error(future) for future in running]
    for tokens, expected in zip(ends, reference.tokens_64, strict=False):
        assert tokens in (None, expected.tokens)
    assert server.process.wait(120) != 0
    assert not surviving_processes(server.process.pid)


def test_before_the_vote_requests_go_on_and_afterwards_the_server_ends(servers, reference):
    server = start(servers, "check memory, gather memory, plan memory, exchange memory")
    expected = reference.tokens_64[1].tokens
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            running = pool.submit(server.generate, reference.prompts[8], 64)
            time.sleep(0.05)
            answer = merge(server)
            assert answer.status_code == 400 and answer.json()["error"] == NO_MEMORY
            assert [each["level"] for each in answer.json()["instances"]] == [1, 1]
            assert running.result(timeout=120).tokens == expected
    end_in_a_merge(server, reference)
    servers.stop()


@pytest.mark.parametrize(
    ("faults", "flags"),
    [("rebuild kill", ()), ("gather hang", ("--watchdog-timeout", "8"))],
    ids=["kill", "hang"],
)
def test_a_rank_that_is_gone_ends_the_server(servers, reference, faults, flags):
    server = start(servers, faults, *flags)
    end_in_a_merge(server, reference)
    servers.stop()
