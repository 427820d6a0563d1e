"""KV caches that two ranks divide by token: the answers are stock SGLang's, and a pool holds twice the tokens."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import crowd
import pytest
import requests
from crowd import CROWDED
from harness import SUPPORT, shift_flags
from prompts import assert_same_answers
from two_layers import LAYERS

ROWS = 4096  # of each rank's pool
LAYOUTS = [
    pytest.param((4, 2), marks=[pytest.mark.server, pytest.mark.full]),
    pytest.param((4, 4), marks=[pytest.mark.server, pytest.mark.full]),
]


def flags_of(world, sp, shards, rows):
    """The demo model has 2 KV heads, so on 4 ranks each KV head is on two of them."""
    return (
        *shift_flags(world, sp), "--dcp-size", shards, "--chunked-prefill-size", "256", "--enable-mixed-chunk",
        "--max-total-tokens", str(rows),
    )  # fmt: skip


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda p: f"P{p[0]}-S{p[1]}")
def server(request, reference, servers):
    return servers.get(*flags_of(*request.param, "auto", ROWS))


@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_tokens_and_logprobs(server, reference, policy):
    """Prompts of up to 2,000 tokens in chunks of 256, so most chunks have a prefix that is divided."""
    with server.policy(policy, threshold=64) as steps:
        answers = server.generate_all(reference.prompts[::4], 4)
    assert_same_answers(answers, [answer.first(8) for answer in reference.answers[1][::4]])
    assert (steps["tp"] > 0, steps["sp"] > 0) == (policy != "sp", policy != "tp")


@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_chunks_beside_decodes(server, reference, policy):
    """Without logprobs SGLang mixes decodes into chunks: one step then moves queries and keys."""
    prompts, expected = reference.prompts[1::3], reference.answers[1][1::3]
    with server.policy(policy, threshold=64):
        answers = server.generate_beside_decodes(prompts)
    assert [answer.tokens for answer in answers] == [answer.tokens[:8] for answer in expected]


@pytest.mark.parametrize(("writer", "reader"), [("sp", "tp"), ("tp", "sp")])
def test_prefixes_from_the_radix_cache(server, reference, writer, reader):
    """A second request hits what the other mode wrote, up to a page of D tokens, and continues it."""
    chosen = [i for i, ids in enumerate(reference.prompts) if len(ids) > 200][::4]
    answers, steps = server.generate_in_halves([reference.prompts[i] for i in chosen], writer, reader)
    for i, answer in zip(chosen, answers, strict=True):
        half = len(reference.prompts[i]) // 2
        assert half - 2 <= answer.meta["cached_tokens"] <= half and answer.meta["cached_tokens"] % 2 == 0
    assert steps[writer] == 0 < steps[reader]
    assert_same_answers(answers, [reference.answers[1][i].first(8) for i in chosen])


def test_many_requests_share_a_prefix(server, reference):
    """The whole prompt is cached. The step that computes its last token again runs beside the decodes of others."""
    ids, expected = reference.prompts[-1], reference.answers[1][-1].first(8)
    server.flush_cache()
    server.generate(ids, 1)
    with server.policy("tokens", 64), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.generate(ids), range(8)))
    assert all(answer.meta["cached_tokens"] >= len(ids) - 2 for answer in answers)
    assert_same_answers(answers, [expected] * 8)


def test_beams_are_refused(server):
    body = {"input_ids": [5, 6, 7], "sampling_params": {"beam_width": 2, "max_new_tokens": 4}}
    response = requests.post(server.url + "/generate", json=body, timeout=60)
    assert response.status_code == 400 and "beam_width is 2, but beams need" in response.text
    assert server.generate([5, 6, 7], 4).tokens


def test_capacity(server):
    """Exactly D times the tokens, in the bytes that the same rows take without shards."""
    info = requests.get(server.url + "/server_info", timeout=60).json()
    state = server.state
    assert info["max_total_num_tokens"] == state["kv_tokens"] == 2 * ROWS
    assert state["kv_shards"] == info["dcp_size"] == 2
    layers, width, element = LAYERS, 32, 4  # a KV head of the demo model in float32; SGLang adds a row for padding
    assert state["kv_bytes"] == (ROWS + 1) * layers * 2 * width * element


# A pool that is too small

FEW_ROWS = 400
PROMPT, OUTPUT = 100, 80  # tokens: two such requests fit 400 rows, and four fit 2 * 400


def small(servers, shards):
    return servers.get(*flags_of(4, 4, shards, FEW_ROWS), "--schedule-conservativeness", "0.01")


def distinct(count, length):
    return [[(7 * i + 13 * n) % 4000 + 10 for n in range(length)] for i in range(count)]


def decode_steps(server):
    """Eight requests at once. SGLang reserves all tokens of a request that ignores the end of its text."""
    server.flush_cache()
    with server.policy("tokens", threshold=64) as steps:
        answers = server.generate_all(distinct(8, PROMPT), 8, OUTPUT)
    return steps["tp"], answers


@pytest.mark.server
@pytest.mark.full
def test_half_the_decode_steps(reference, servers):
    alone, answers = decode_steps(small(servers, "1"))
    server = small(servers, "2")
    divided, same = decode_steps(server)
    assert_same_answers(same, answers)
    assert 0.4 < divided / alone < 0.65, (divided, alone)


@pytest.mark.server
@pytest.mark.full
def test_retraction(reference, servers):
    """Requests outgrow the pool, lose their tokens, and are answered as if they had not."""
    server = small(servers, "2")
    prompts = [ids for ids in reference.prompts if 40 < len(ids) < 80]

    def ask(ids):
        return server.generate(ids, 120, sampling_params={"ignore_eos": False})

    server.flush_cache()
    with ThreadPoolExecutor(2) as pool:  # two fit
        calm = list(pool.map(ask, prompts))
    assert not any(answer.meta["num_retractions"] for answer in calm)
    server.flush_cache()
    with server.policy("tokens", 6) as steps, ThreadPoolExecutor(len(prompts)) as pool:
        futures = []
        for ids in prompts:
            futures.append(pool.submit(ask, ids))
            time.sleep(0.06)
        crowded = [future.result() for future in futures]
    assert sum(answer.meta["num_retractions"] for answer in crowded) > 0, "the pool was not too small"
    assert min(steps.values()) > 0
    assert_same_answers(crowded, calm)


@pytest.mark.server
@pytest.mark.full
def test_everything_at_once(reference, servers):
    """Chunks of the floor beside decodes, cached prefixes, retractions, and a mode that is switched from outside."""
    stock = servers.get("--dtype", "float32", "--tp-size", "1")
    expected = [
        stock.generate(ids, crowd.STREAM_TOKENS, sampling_params={"ignore_eos": False}) for ids in crowd.streams()
    ]
    expected += [
        stock.generate(ids, crowd.LONG_TOKENS, sampling_params={"ignore_eos": False}) for ids in crowd.long_prompts()
    ]
    flags = (
        "--dtype", "float32", "--tp-size", "4", "--enable-shift-parallel", "--dcp-size", "auto",
        "--chunked-prefill-size", "1024", "--max-total-tokens", str(FEW_ROWS), *CROWDED,
    )  # fmt: skip
    answers = crowd.answers_of(servers.get(*flags), page=2)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


@pytest.mark.server
@pytest.mark.full
def test_without_the_refusal_answers_are_wrong(reference, servers):
    """Two ranks with a KV head each, forced to divide tokens: nothing fails, and no long prompt is answered right."""
    flags = flags_of(2, 2, "2", ROWS)
    server = servers.get(*flags, "--shift-check", "off", module=[str(SUPPORT / "unchecked_shards_server.py")])
    prompts, expected = reference.prompts[32::4], reference.answers[1][32::4]
    for policy in ("tp", "sp"):
        with server.policy(policy):
            answers = server.generate_all(prompts, 4)
        assert not any(answer.tokens == right.tokens[:8] for answer, right in zip(answers, expected, strict=True))
    servers.stop()
