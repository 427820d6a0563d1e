"""A calibrated server with a bound on the gap between tokens: the same answers, in chunks that fit the bound."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import requests
from prompts import assert_same_answers, text_ids
from safetensors.torch import load_file
from sglang_shift.cost.chunk_budget import FLOOR, ChunkBudget, Decodes, Prompts
from sglang_shift.cost.model import CostModel
from sglang_shift.observe.events import StepEvent, Subscriber
from two_layers import two_layer_model

CHUNK = 1024
FLAGS = (
    "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--enable-metrics",
    "--chunked-prefill-size", str(CHUNK), "--shift-tbt-target", "1000",
)  # fmt: skip

pytestmark = [pytest.mark.server, pytest.mark.full]

STREAMS, STREAM_TOKENS = 4, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tbt")


@pytest.fixture
def server(servers, folder):
    env = {"SGLANG_SHIFT_CACHE_DIR": str(folder), "SGLANG_SHIFT_EVENTS": f"ipc://{folder}/events"}
    server = servers.get(*FLAGS, env=env)
    yield server
    server.set(shift_tbt_target=1000)


@pytest.fixture(scope="module")
def prompts():
    """Short prompts for streams, and long ones. Half of the long ones share a prefix of 1500 tokens."""
    ids = text_ids()
    streams = [ids[100 * i : 100 * i + 40] for i in range(STREAMS)]
    shared = [ids[:1500] + ids[3000 + 90 * i : 3000 + 90 * i + 300 + 100 * i] for i in range(4)]
    own = [ids[700 * i : 700 * i + 300 + 500 * i] for i in range(1, 5)]
    return streams, shared + own


@contextmanager
def watch(folder, monkeypatch):
    """Collect the step events of the block."""
    monkeypatch.setenv("SGLANG_SHIFT_EVENTS", f"ipc://{folder}/events")
    subscriber, found, stop = Subscriber(timeout_ms=100), [], threading.Event()

    def collect():
        while not stop.is_set():
            if isinstance(event := subscriber.receive(), StepEvent):
                found.append(event)

    thread = threading.Thread(target=collect)
    thread.start()
    time.sleep(0.5)
    try:
        yield found
        time.sleep(0.5)
    finally:
        stop.set()
        thread.join()
        subscriber.close()


def ask(server, ids, tokens, **extra):
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return server.post("/generate", {"input_ids": ids, "sampling_params": sampling, **extra})


def load(server, prompts, **extra):
    """Send the streams, and the long prompts while they run. Return all tokens."""
    streams, long = prompts
    server.flush_cache()
    with ThreadPoolExecutor(len(streams) + len(long)) as pool:
        futures = [pool.submit(ask, server, ids, STREAM_TOKENS, **extra) for ids in streams]
        time.sleep(0.3)
        for ids in long:
            futures.append(pool.submit(ask, server, ids, 8, **extra))
            time.sleep(0.05)
        return [future.result() for future in futures]


def tokens_of(answers):
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def calm(servers, prompts):
    """The tokens of the same prompts, one after the other and without a bound."""
    found = []

    def get(server):
        if not found:
            server.set(shift_tbt_target=0)
            server.flush_cache()
            assert server.state["chunks"] is None
            streams, long = prompts
            found.extend([ask(server, ids, STREAM_TOKENS)["output_ids"] for ids in streams])
            found.extend([ask(server, ids, 8)["output_ids"] for ids in long])
        return found

    return get


def target_for(server, tokens, mixed):
    """A target in ms at which a step takes about this number of prompt tokens beside the streams."""
    costs = msgspec.convert(server.state["costs"], CostModel)
    decodes = Decodes(STREAMS, 100 * STREAMS, mixed=mixed)
    budget = ChunkBudget(costs, 1.0)
    seconds = budget.step_seconds(Prompts().plus(0, tokens), decodes)
    return 1e3 * (seconds if mixed else seconds + budget.decode_seconds(decodes))


def test_prompts_and_decodes_share_steps(server, prompts, calm, folder, monkeypatch):
    expected = calm(server)
    target = target_for(server, 700, mixed=True)
    server.set(shift_tbt_target=target)
    before = server.state["chunks"]
    with watch(folder, monkeypatch) as events:
        answers = load(server, prompts)
    assert tokens_of(answers) == expected
    assert any(answer["meta_info"]["cached_tokens"] >= 1500 for answer in answers[STREAMS:]), "no prefix was cached"
    after = server.state["chunks"]
    assert after["target_ms"] == pytest.approx(target)
    assert after["steps"]["mixed"] > before["steps"]["mixed"]
    assert after["steps"]["alternating"] == before["steps"]["alternating"]
    bounded = [e for e in events if e.chunk_room is not None]
    assert bounded
    assert {e.phase for e in bounded} == {"mixed"}
    assert all(e.prefill_tokens <= e.chunk_room and e.chunk_budget > 0 for e in bounded)
    assert any(FLOOR <= e.chunk_room < CHUNK - STREAMS for e in bounded), "the bound never made a chunk shorter"


def test_prompts_and_decodes_take_turns(server, prompts, calm, folder, monkeypatch):
    """SGLang computes no logprobs in mixed steps."""
    expected = calm(server)
    server.set(shift_tbt_target=target_for(server, 700, mixed=False))
    before = server.state["chunks"]
    with watch(folder, monkeypatch) as events:
        answers = load(server, prompts, return_logprob=True)
    assert tokens_of(answers) == expected
    after = server.state["chunks"]
    assert after["steps"]["alternating"] > before["steps"]["alternating"]
    assert after["steps"]["mixed"] == before["steps"]["mixed"]
    bounded = [e for e in events if e.chunk_room is not None]
    assert bounded
    assert {e.phase for e in bounded} == {"prefill"}
    following = [(a, b) for a, b in pairwise(events) if a.chunk_room is not None and b.step == a.step + 1]
    assert following
    assert all(after.phase == "decode" for _, after in following)


def test_both_kinds_of_requests_at_once(server, prompts, calm):
    expected = calm(server)
    server.set(shift_tbt_target=target_for(server, 700, mixed=True))
    streams, long = prompts
    server.flush_cache()
    with ThreadPoolExecutor(len(expected)) as pool:
        sizes = [(ids, STREAM_TOKENS) for ids in streams] + [(ids, 8) for ids in long]
        kinds = [{"return_logprob": i % 3 == 0} for i in range(len(sizes))]
        futures = [pool.submit(ask, server, *size, **kind) for size, kind in zip(sizes, kinds, strict=True)]
        assert tokens_of(future.result() for future in futures) == expected


def test_the_floor_lets_prompts_progress_and_the_log_says_so(server, prompts, calm, folder, monkeypatch):
    expected = calm(server)
    server.set(shift_tbt_target=0.001)
    with watch(folder, monkeypatch) as events:
        assert tokens_of(load(server, prompts)) == expected
    assert {e.chunk_room for e in events if e.chunk_room is not None} == {FLOOR}
    assert server.state["chunks"]["steps"]["floor"] > 0
    assert "a step never takes fewer than 512 if more wait" in server.tail(1_000_000)


def test_a_short_prompt_does_not_wait_for_a_long_one(server, folder, monkeypatch):
    ids = text_ids()
    server.set(shift_tbt_target=1000)
    server.flush_cache()
    with watch(folder, monkeypatch) as events, ThreadPoolExecutor(4) as pool:
        long = [pool.submit(ask, server, ids[2000 * i : 2000 * i + 3900], 1) for i in range(3)]
        time.sleep(0.2)
        ask(server, ids[5:25], 1)
        for future in long:
            future.result()
    finished = [f.prompt_tokens for e in events for f in e.finished]
    assert sorted(finished) == [20, 3900, 3900, 3900]
    assert finished[-1] == 3900
    assert finished.index(20) <= 1, "it waited for more than the long prompt that was about to end"


def test_answers_are_the_reference_s(server, reference):
    server.set(shift_tbt_target=target_for(server, 600, mixed=False))
    assert_same_answers(server.generate_all(reference.prompts, 16), reference.answers[16])


@pytest.mark.parametrize("value", [-1, -0.5, "fast"])
def test_a_target_that_makes_no_sense_changes_nothing(server, value):
    before = server.state["chunks"]["target_ms"]
    body = {"server_args": {"shift_tbt_target": value}}
    answer = requests.post(server.url + "/set_internal_state", json=body, timeout=60)
    assert answer.status_code != 200 or answer.json() == [False]
    assert server.state["chunks"]["target_ms"] == before


def test_the_page_and_the_metrics_show_the_bound(server, prompts):
    server.set(shift_tbt_target=250)
    load(server, prompts)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = requests.get(server.url + "/shift/status", timeout=60).json()
        if status["tbt"] is not None and status["tbt"]["target"] == 0.25 and status["tbt"]["chunks"]["count"]:
            break
        time.sleep(0.2)
    assert status["tbt"]["target"] == 0.25
    assert 0 < status["tbt"]["margin"] <= 1
    assert status["tbt"]["chunks"]["room"]["p50"] >= FLOOR
    gaps = STREAMS * (STREAM_TOKENS - 1) + len(prompts[1]) * 7  # of all answers of one load
    assert status["gaps"]["10"]["count"] >= gaps and 0 <= status["gaps"]["10"]["late"] <= 1
    text = requests.get(server.url + "/metrics", timeout=60).text
    found = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("sglang")}
    assert found["sglang_shift:tbt_target_seconds"] == 0.25
    assert found["sglang_shift:chunk_room_tokens_count"] > 0
    assert found["sglang_shift:token_gap_seconds_count"] >= gaps


def test_input_embeddings(servers, folder, prompts):
    server = servers.get(*FLAGS, "--disable-radix-cache", env={"SGLANG_SHIFT_CACHE_DIR": str(folder)})
    (file,) = Path(two_layer_model()).glob("*.safetensors")
    rows = load_file(file)["model.embed_tokens.weight"].float()
    streams, long = prompts
    server.set(shift_tbt_target=0)
    expected = [ask(server, ids, STREAM_TOKENS)["output_ids"] for ids in streams]
    expected += [ask(server, ids, 8)["output_ids"] for ids in long[4:6]]
    server.set(shift_tbt_target=target_for(server, 700, mixed=True))
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    given = [{"input_embeds": rows[ids].tolist(), "sampling_params": sampling} for ids in long[4:6]]
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(ask, server, ids, STREAM_TOKENS) for ids in streams]
        time.sleep(0.2)
        embedded = [pool.submit(server.post, "/generate", body) for body in given]
        assert tokens_of(future.result() for future in [*running, *embedded]) == expected
    assert server.state["chunks"]["steps"]["mixed"] > 0


def test_short_prompts_leave_the_memory_that_a_long_prompt_was_admitted_for(servers, folder):
    """One request brings all prompts, the long one first. The others and their answers would outgrow what it leaves."""
    server = servers.get(*FLAGS, "--max-total-tokens", "4000", env={"SGLANG_SHIFT_CACHE_DIR": str(folder)})
    server.set(shift_tbt_target=0.001)  # the floor rules
    ids = text_ids()
    prompts = [ids[:3500], *(ids[4000 + 120 * i :][:120] for i in range(40))]
    sampling = [{"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} for tokens in [8] + 40 * [64]]
    answers = server.post("/generate", {"input_ids": prompts, "sampling_params": sampling})
    assert [len(answer["output_ids"]) for answer in answers] == [8] + 40 * [64]


def test_drafts_take_turns_with_prompts(servers, folder, prompts):
    """Speculative decoding, in a KV pool that is too small for all requests at once: some of them wait."""
    flags = ("--speculative-algorithm", "NGRAM", "--max-total-tokens", "6000", "--schedule-conservativeness", "0.01")
    server = servers.get(*FLAGS, *flags, env={"SGLANG_SHIFT_CACHE_DIR": str(folder)})
    streams, long = prompts
    server.set(shift_tbt_target=0)
    expected = [ask(server, ids, STREAM_TOKENS)["output_ids"] for ids in streams]
    expected += [ask(server, ids, 8)["output_ids"] for ids in long]
    server.set(shift_tbt_target=target_for(server, 700, mixed=False))
    assert tokens_of(load(server, prompts)) == expected
    steps = server.state["chunks"]["steps"]
    assert steps["alternating"] > 0 and steps["mixed"] == 0
