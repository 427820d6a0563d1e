"""A server whose chunks leave out blocks of their prefixes: answers, figures, and whose KV cache a request reads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from harness import REPO, TWO_RANKS
from prompts import assert_same_answers, text_ids
from sparse_server import MIN_PREFIX

CHUNK, LONG = 256, 1360
BOUND = 1e-3  # so small that little of a text can be left out, and much of a prompt of equal tokens
TOO_LITTLE = "its chunks could leave out too little"
FLAGS = (
    *TWO_RANKS, "--shift-sparse-prefill", str(BOUND), "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk",
    "--enable-metrics",
)  # fmt: skip
MODULE = (str(REPO / "test/support/sparse_server.py"),)
pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.fixture
def server(servers):
    return servers.get(*FLAGS, module=MODULE)


@pytest.fixture(scope="module")
def texts():
    ids = text_ids()
    return [ids[start : start + LONG] for start in (0, 2500)]


@pytest.fixture(scope="module")
def monotone():
    return [[token] * LONG for token in (7, 3999)]


@pytest.fixture(scope="module")
def exact(servers, texts, monotone):
    """Exact answers of the same server: those that ask for a logprob of the prompt."""
    server = servers.get(*FLAGS, module=MODULE)
    with server.policy("tp"):
        return [server.generate(ids, logprob_start_len=LONG - 1) for ids in (*texts, *monotone)]


@pytest.mark.parametrize("policy", ["tp", "sp"])
def test_answers_come_close_to_exact_ones(server, texts, monotone, exact, policy):
    with server.policy(policy) as steps:
        answers = server.generate_all([*texts, *monotone], 1)
    assert {mode for mode, count in steps.items() if count} == {policy}
    assert_same_answers(answers, exact, tolerance=20 * BOUND)
    figures = [answer.meta["shift_sparse"] for answer in answers]
    for each in figures:
        assert 0 < each["mean"] <= each["p99"] <= each["max"] <= BOUND, each
    for each in figures[: len(texts)]:
        assert (each["tokens"], each["exact"]) == (CHUNK, TOO_LITTLE), each
        assert 0.95 < each["computed"] < 1, each
    for each in figures[len(texts) :]:
        assert (each["tokens"], each["exact"]) == (LONG - MIN_PREFIX, ""), each
        assert 0.3 < each["computed"] < 0.8, each


def test_exact_requests_read_no_keys_of_sparse_ones(server, monotone):
    """Each kind of request finds the prefixes of its own kind only, whatever radix key it brings."""
    ids = monotone[0]
    exact = {"logprob_start_len": LONG - 1}  # its prefix may be cached, up to the last token
    server.flush_cache()
    first = server.generate(ids)
    assert first.meta["shift_sparse"]["tokens"] > 0
    for key in (None, "sparse|", "exact|", "sparse", "mine"):
        answer = server.generate(ids, extra_key=key, **exact)
        assert answer.meta["cached_tokens"] == 0, key
        assert answer.meta["shift_sparse"] == {
            "tokens": 0, "mean": 0, "p99": 0, "max": 0, "computed": 1, "exact": "it asks for logprobs of its prompt",
        }  # fmt: skip
        again = server.generate(ids, extra_key=key, **exact)
        assert again.meta["cached_tokens"] == LONG - 1, key
        assert_same_answers([again], [answer])
    again = server.generate(ids)
    assert again.meta["cached_tokens"] == LONG - 1
    assert again.meta["shift_sparse"]["tokens"] == 0, "one token leaves out nothing"
    assert_same_answers([again], [first])


def test_chunks_beside_decodes(server, texts, monotone, exact):
    """Without logprobs SGLang mixes decodes into chunks. Short prompts are exact."""
    short = [ids[:100] for ids in texts]
    with server.policy("tokens", 64):
        expected = [server.generate(ids, 24) for ids in short]
        server.flush_cache()
        with ThreadPoolExecutor(6) as pool:
            running = pool.map(lambda ids: server.generate(ids, 24, return_logprob=False), short)
            longs = list(pool.map(lambda ids: server.generate(ids, return_logprob=False), [*texts, *monotone]))
            shorts = list(running)
    assert [answer.tokens for answer in longs] == [answer.tokens for answer in exact]
    assert [answer.tokens for answer in shorts] == [answer.tokens for answer in expected]
    assert all(answer.meta["shift_sparse"]["tokens"] > 0 for answer in longs)
    assert all(answer.meta["shift_sparse"]["tokens"] == 0 for answer in shorts)


def test_figures_are_in_the_metrics_and_the_state(server, monotone):
    server.flush_cache()
    before = server.state["sparse_prefill"]["chunks"]
    tokens = sum(server.generate(ids).meta["shift_sparse"]["tokens"] for ids in monotone)
    assert server.state["sparse_prefill"] == {
        "bound": BOUND, "prefix": MIN_PREFIX, "chunks": before + len(monotone) * -(-(LONG - MIN_PREFIX) // CHUNK),
    }  # fmt: skip
    deadline = time.monotonic() + 30  # the events of the last step may be on their way
    while (found := metrics_of(server)).get("tokens_total", 0) < tokens and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found["tokens_total"] >= tokens
    assert found["dropped_mass_count"] == found["computed_share_count"] >= len(monotone)
    assert 0 < found["dropped_mass_sum"] / found["dropped_mass_count"] <= BOUND


def metrics_of(server):
    prefix = "sglang_shift:sparse_"
    lines = requests.get(server.url + "/metrics", timeout=60).text.splitlines()
    return {line[len(prefix) :].split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith(prefix)}
