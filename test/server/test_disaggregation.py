"""A prefill server and a decode server, connected by SGLang's Mooncake connection: its engine is replaced.

What a prefill server writes in SP, a decode server reads in TP or SP, and gives stock SGLang's answers.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from harness import SMALL_CHUNKS, SUPPORT, TWO_RANKS, Answer, Server
from prompts import assert_same_answers
from sglang_shift.tools.servers import free_port

pytestmark = [pytest.mark.server, pytest.mark.full]

ROOMS = itertools.count(1)


class Pair:
    """A prefill server and a decode server. A request goes to both, as a router sends it."""

    def __init__(self, prefill: tuple[str, ...], decode: tuple[str, ...]) -> None:
        self.bootstrap_port = free_port()
        self.prefill = self._start("prefill", prefill)
        self.decode = self._start("decode", (*decode, "--disaggregation-decode-retraction-backup", "cpu_tensor"))

    def _start(self, role: str, flags: tuple[str, ...]) -> Server:
        transfer = ("--disaggregation-transfer-backend", "mooncake")
        port = ("--disaggregation-bootstrap-port", str(self.bootstrap_port))
        module = [str(SUPPORT / "disaggregated_server.py")]
        env = {"SGLANG_HOST_IP": "127.0.0.1"}
        return Server([*flags, "--disaggregation-mode", role, *transfer, *port], module, env, forked=True)

    def stop(self) -> None:
        for server in (self.prefill, self.decode):
            server.stop()

    def generate(self, ids: list[int], count: int = 8) -> Answer:
        """Ask both servers. The answer is the decode server's."""
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": next(ROOMS)}
        with ThreadPoolExecutor(1) as pool:
            prefill = pool.submit(self.prefill.generate, ids, count, **where)
            answer = self.decode.generate(ids, count, **where)
            prefill.result()
        return answer


@pytest.fixture(scope="module")
def pair(reference, servers):
    servers.stop()
    pair = Pair(SMALL_CHUNKS, TWO_RANKS)
    try:
        pair.prefill.wait_ready()
        pair.decode.wait_ready()
        yield pair
    finally:
        pair.stop()


@pytest.mark.parametrize("decoder", ["tp", "sp"])
@pytest.mark.parametrize("prefiller", ["tp", "sp", "tokens"])
def test_same_answers(pair, reference, prefiller, decoder):
    pair.prefill.flush_cache()
    prefill, decode = pair.prefill.policy(prefiller, 64), pair.decode.policy(decoder)
    with prefill as prefills, decode as decodes, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(pair.generate, reference.prompts[::2]))
    assert_same_answers(answers, reference.answers[16][::2])
    assert modes(prefills) == ({"tp", "sp"} if prefiller == "tokens" else {prefiller})
    assert modes(decodes) == {decoder}


def modes(steps: dict[str, int]) -> set[str]:
    return {mode for mode, count in steps.items() if count}


def test_finished_requests_are_reported(pair, reference):
    """A prefill server's requests finish after their last step, and a decode server's begin with their KV cache."""
    for _ in range(2):
        pair.generate(reference.prompts[40])
    for server in (pair.prefill, pair.decode):
        requested = requests.get(server.url + "/shift/status", timeout=60).json()["requests"]
        assert requested["count"] > 0 and requested["ttft"]["p50"] > 0, requested
