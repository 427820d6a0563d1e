"""Two nodes of two ranks, each in its own network namespace: an SP group spans both of them, and a node may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests
from harness import SUPPORT, Server, shift_flags, surviving_processes
from prompts import assert_same_answers
from sglang_shift.errors import ShiftError
from sglang_shift.tools.benchmark.link import Link, check

pytestmark = [pytest.mark.server, pytest.mark.full]

NODES = 2


@dataclass
class Node(Server):
    """One node of a server. The first node answers requests."""

    link: Link | None = None
    rank: int = 0

    def _spawn(self) -> subprocess.Popen[bytes]:
        assert self.link is not None
        self.url = f"http://{self.link.server_address}:{self.port}"
        launch = [sys.executable, str(SUPPORT / "forked_server.py"), *self.module, *self._model(), *self.flags]
        launch += ["--nnodes", str(NODES), "--node-rank", str(self.rank), "--dist-init-addr", self.link.rendezvous]
        command = self.link.command(self.rank, [*launch, "--host", "0.0.0.0", "--port", str(self.port)])
        env = {**os.environ, **self.link.environment(self.rank), "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
        env.pop("SGLANG_CPU_OMP_THREADS_BIND", None)  # of an earlier server; the link places one rank on each node
        with self.log.open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


@pytest.fixture(scope="module", params=[2, 4], ids=["S across nodes", "S across and inside of nodes"])
def nodes(request, reference, servers):
    """With S = 2, a base-TP group is a node. With S = 4 there is one group of all ranks."""
    try:
        check()
    except ShiftError as error:
        pytest.skip(str(error))
    servers.stop()
    flags = [*shift_flags(4, request.param), "--max-total-tokens", "20000"]
    with Link(NODES, None) as link:
        nodes = [Node(flags, link=link, rank=rank) for rank in range(NODES)]
        try:
            nodes[0].wait_ready()
            yield nodes
        finally:
            for node in nodes:
                node.stop()


@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_answers(nodes, reference, policy):
    server = nodes[0]
    with server.policy(policy, 64) as steps:
        answers = server.generate_all(reference.prompts[::4], 8)
    assert_same_answers(answers, reference.answers[16][::4])
    wanted = {"tp", "sp"} if policy == "tokens" else {policy}
    assert {mode for mode, count in steps.items() if count} == wanted


def test_a_node_that_dies_ends_the_other(nodes):
    """Running requests end with an error, and the node that is left ends with its processes: no hang."""
    server, other = nodes
    before = sum(server.state["steps"].values())
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.generate, list(range(50, 200 + i)), 3000) for i in range(4)]
        while sum(server.state["steps"].values()) < before + 20:
            time.sleep(0.1)
        os.killpg(other.process.pid, signal.SIGKILL)
        for future in running:
            with pytest.raises((requests.RequestException, AssertionError)):
                future.result(timeout=300)
    assert server.process.wait(300) != 0
    assert not surviving_processes(server.process.pid)
