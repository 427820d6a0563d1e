"""How servers end, by themselves or when they are told to: with an exit code, and no process left."""

from __future__ import annotations

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from harness import TWO_RANKS, Server, child_process, surviving_processes
from sglang_shift.tools.servers import free_port


@pytest.mark.server
@pytest.mark.full
def test_sglang_serve_and_nodes_started_differently(servers):
    """Two nodes of one rank each, on this machine, through `sglang serve`; their thresholds differ."""
    servers.stop()
    rendezvous = f"127.0.0.1:{free_port()}"
    common = ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", rendezvous, "--enable-shift-parallel"]
    module = [str(Path(sys.executable).parent / "sglang"), "serve"]
    nodes = [
        Server([*common, "--node-rank", str(rank), "--shift-threshold", str(100 + rank)], module=module, forked=True)
        for rank in (0, 1)
    ]
    try:
        for node in nodes:
            assert node.process.wait(300) != 0
        logs = "".join(node.tail(20_000) for node in nodes)
        assert "--shift-threshold is 100 on rank 0 and 101 on rank 1" in logs
        assert not any(surviving_processes(node.process.pid) for node in nodes)
    finally:
        for node in nodes:
            node.stop()


@pytest.fixture
def server(servers):
    """Steps of both modes."""
    server = servers.get(*TWO_RANKS)
    server.set_policy("tokens", 8)
    return server


@pytest.mark.server(*TWO_RANKS)
def test_two_servers_on_one_machine_and_one_is_told_to_end_under_load(server):
    """SIGTERM lets running requests finish and leaves no process; the other server does not notice."""
    first, ids = server, list(range(50, 80))
    expected = first.generate(ids, 8).tokens
    second = Server(list(TWO_RANKS), forked=True)
    try:
        second.wait_ready().set_policy("tokens", 8)
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(second.generate, [*ids, i], 150) for i in range(8)]
            assert second.generate(ids, 8).tokens == first.generate(ids, 8).tokens == expected
            second.process.send_signal(signal.SIGTERM)
            assert [len(future.result(timeout=120).tokens) for future in running] == [150] * 8
        second.process.wait(120)
        assert not surviving_processes(second.process.pid)
        assert first.generate(ids, 8).tokens == expected
    finally:
        second.stop()


@pytest.mark.server(*TWO_RANKS)
def test_a_rank_that_dies_takes_the_server_down(server, servers):
    """A killed rank ends the server with an error, and all running requests with it: no hang."""
    rank = child_process(server, "scheduler_TP1")
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.generate, list(range(50, 200 + i)), 3800) for i in range(8)]
        time.sleep(1)
        rank.kill()
        for future in running:
            with pytest.raises((requests.RequestException, AssertionError)):
                future.result(timeout=120)
    assert server.process.wait(120) != 0
    assert not surviving_processes(server.process.pid)
    servers.stop()
