"""Instances over HTTP: replicas in one world, merged and split by hand while they serve, answer as stock does."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests
from harness import Answer, Server, child_process, surviving_processes
from prompts import assert_same_answers, prompts
from sglang_shift.models.random_model import write_random_model

CAPACITY = 511  # tokens of one of two replicas
TWO = (
    "--dtype", "float32", "--tp-size", "2", "--instances", "2", "--enable-shift-parallel", "--shift-threshold", "20",
    "--max-total-tokens", "1024", "--max-running-requests", "16", "--chunked-prefill-size", "128", "--sleep-on-idle",
    "--enable-metrics",
)  # fmt: skip
pytestmark = pytest.mark.server

STREAMS = 6
NEW_TOKENS = 64


def instances(server: Server, **wanted: Any) -> dict[str, Any]:
    """Ask for other instances, and return the report."""
    report: dict[str, Any] = server.post("/shift/instances", {"reason": "a test", **wanted})
    return report


def layout(server: Server) -> list[tuple[int, int]]:
    """The first rank and the level of each instance."""
    report = requests.get(server.url + "/shift/instances", timeout=60).json()
    return [(each["first"], each["level"]) for each in report["instances"]]


class Stream:
    """A request whose tokens arrive one after the other."""

    def __init__(self, server: Server, ids: list[int], count: int, logprobs: bool = True, interval: int = 1) -> None:
        self.chunks: list[dict[str, Any]] = []
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True, "stream_interval": interval}
        self.body = {"input_ids": ids, "sampling_params": sampling, "stream": True, "return_logprob": logprobs}
        self.url = server.url + "/generate"

    def run(self) -> list[int]:
        """Read the stream to its end, and return its tokens."""
        with requests.post(self.url, json=self.body, stream=True, timeout=300) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    self.chunks.append(json.loads(line[6:]))
        tokens: list[int] = self.chunks[-1].get("output_ids", [])
        return tokens

    @property
    def aborted(self) -> bool:
        """Whether the request was aborted. If it waited for its next step, SGLang sends an error as the last event."""
        last = self.chunks[-1]
        reason = last.get("meta_info", {}).get("finish_reason") or {}
        return reason.get("type") == "abort" or "abort" in json.dumps(last.get("error", "")).lower()


class Streams:
    """Streams that run while a test does something else."""

    def __init__(self, server: Server, ids: list[list[int]], count: int = NEW_TOKENS, **options: Any) -> None:
        self.streams = [Stream(server, each, count, **options) for each in ids]
        self.pool = ThreadPoolExecutor(len(ids))
        self.futures: list[Future[list[int]]] = [self.pool.submit(each.run) for each in self.streams]

    def wait_for(self, chunks: int) -> None:
        """Wait until each stream has had some chunks, or has ended."""
        deadline = time.monotonic() + 120
        streams = list(zip(self.streams, self.futures, strict=True))
        while any(len(each.chunks) < chunks and not future.done() for each, future in streams):
            assert time.monotonic() < deadline, [len(each.chunks) for each in self.streams]
            time.sleep(0.01)

    def tokens(self) -> list[list[int]]:
        """The tokens of all streams, at their ends."""
        found = [future.result() for future in self.futures]
        self.pool.shutdown()
        return found


@pytest.fixture
def server(reference, servers):
    """Two replicas. They have merged and split before, because the first steps at a level are slow."""
    server = servers.get(*TWO)
    for level in (2, 1):
        instances(server, level=level)
        server.generate([5, 6, 7], 4)
    return server


def short(reference: Any, count: int) -> tuple[list[list[int]], list[Any]]:
    """The prompts that a replica can hold with ``count`` new tokens, and their places."""
    places = [i for i, ids in enumerate(reference.prompts) if len(ids) + count + 2 <= CAPACITY]
    return [reference.prompts[i] for i in places], places


def test_replicas_answer_as_stock_does(server, reference):
    ids, places = short(reference, 8)
    answers = server.generate_all(ids, 8)
    assert_same_answers(answers, [reference.answers[16][i] for i in places])
    assert {answer.meta["dp_rank"] for answer in answers} == {0, 1}


def test_a_request_that_no_instance_holds_is_answered_at_once(server, reference):
    body = {"input_ids": reference.prompts[-1][:600], "sampling_params": {"max_new_tokens": 8}}
    response = requests.post(server.url + "/generate", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert "needs 610 tokens" in response.text and "merge to 2 ranks" in response.text
    assert server.generate([5, 6, 7], 4).tokens


def test_merge_and_split_while_requests_stream(server, reference):
    ids = [reference.prompts[8 * i] for i in range(STREAMS)]
    server.flush_cache()
    streams = Streams(server, ids)
    streams.wait_for(2)
    merged = instances(server, level=2)
    assert [each["level"] for each in merged["instances"]] == [2]
    streams.wait_for(2 + min(len(each.chunks) for each in streams.streams))
    split = instances(server, level=1)
    # On a busy machine, the first streams may have ended before the last one could be read.
    assert STREAMS >= merged["instances"][0]["requests"] >= sum(each["requests"] for each in split["instances"]) > 0
    tokens = streams.tokens()
    assert tokens == [each.tokens for each in reference.tokens_64[:STREAMS]]
    for stream in streams.streams:
        assert len(stream.chunks) > 20, "few events for all tokens are not streaming"
        assert len(stream.chunks[-1]["meta_info"]["output_token_logprobs"]) == NEW_TOKENS
    for change in (*merged["changes"], *split["changes"]):
        assert change["ok"] and change["bytes_sent"] > 0 and change["phases"]
        assert change["tokens_recomputed"] <= STREAMS, "one token of each request"


def test_merged_ranks_hold_long_requests_and_run_both_modes(server, reference):
    instances(server, level=2)
    long = [ids for ids in reference.prompts if CAPACITY < len(ids) < 2 * CAPACITY - 20]
    expected = [a for ids, a in zip(reference.prompts, reference.answers[16], strict=True) if ids in long]
    before = server.state["steps"]
    assert_same_answers(server.generate_all(long, 2), expected)
    assert all(server.state["steps"][mode] > before[mode] for mode in before), "both modes ran"


def test_control_requests(server, reference):
    state = server.state
    assert [each["level"] for each in state["instances"]["instances"]] == [1, 1]
    loads = requests.get(server.url + "/v1/loads", timeout=60).json()["loads"]
    assert [each["dp_rank"] for each in loads] == [0, 1]
    for rank, count in ((1, 1), (2, 0)):
        loads = requests.get(server.url + "/v1/loads", params={"dp_rank": rank}, timeout=60).json()["loads"]
        assert [each["dp_rank"] for each in loads] == [rank] * count
    assert requests.get(server.url + "/health_generate", timeout=60).status_code == 200

    answer = requests.post(server.url + "/update_weights_from_disk", json={"model_path": "/none"}, timeout=60)
    assert answer.status_code == 400 and "needs all 2 ranks as one instance" in answer.text
    for wanted, why in (({"level": 3}, "level 3 is not one of"), ({"levels": 2}, "the body is not as")):
        answer = requests.post(server.url + "/shift/instances", json=wanted, timeout=60)
        assert answer.status_code == 400 and why in answer.json()["error"], answer.text

    server.post("/pause_generation", {"mode": "in_place"})
    answer = requests.post(server.url + "/shift/instances", json={"level": 2}, timeout=60)
    assert answer.status_code == 400 and "paused" in answer.json()["error"]
    server.post("/continue_generation", {})
    assert server.generate(reference.prompts[8], 8).tokens == reference.tokens_64[1].tokens[:8]


def test_aborts_reach_a_request_after_a_merge(server, reference):
    for _ in range(5):  # On a busy machine, a request may end before its first event is read.
        instances(server, level=1)
        # An event a token, with the logprobs of all tokens before, can keep the HTTP process busy until a request ends.
        streams = Streams(server, reference.prompts[:2], count=480, logprobs=False, interval=8)
        streams.wait_for(1)
        instances(server, level=2)
        server.post("/abort_request", {"abort_all": True})
        streams.tokens()
        if all(stream.aborted for stream in streams.streams):
            break
    else:
        raise AssertionError([stream.chunks[-1] for stream in streams.streams])
    server.flush_cache()


def test_what_the_page_and_the_metrics_show(server):
    for level in (2, 1):
        instances(server, level=level)
    deadline = time.monotonic() + 30
    while True:
        status = requests.get(server.url + "/shift/status", timeout=60).json()["instances"]
        text = requests.get(server.url + "/metrics", timeout=60).text
        if status and [each["level"] for each in status["instances"]] == [1, 1] and "instances{" in text:
            break
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    assert status["last"][-1]["ok"] and status["last"][-1]["why"] == "a test"
    assert 'sglang_shift:instance_changes_total{level="2"' in text


def answers_of_stock(
    servers: Any, model: tuple[str, ...], ids: list[list[int]], tokens: int, long: list[int]
) -> tuple[list[list[int]], list[int]]:
    """The answers of one rank of stock SGLang: so many tokens to each prompt, and 8 tokens to a long one."""
    stock = servers.get(*model, "--tp-size", "1")
    return [stock.generate(each, tokens).tokens for each in ids], stock.generate(long, 8).tokens


@pytest.mark.full
def test_four_ranks_between_all_levels(servers, tmp_path):
    write_random_model(
        tmp_path, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    model = ("--dtype", "float32", "--model-path", str(tmp_path))
    ids = [each for each in prompts(24, 300) if len(each) > 3][::3]
    long = prompts(2, 1200)[1]
    expected, expected_long = answers_of_stock(servers, model, ids, 96, long)

    flags = ("--tp-size", "4", "--instances", "2", "--enable-shift-parallel", "--shift-threshold", "6")
    server = servers.get(*model, *flags, "--max-total-tokens", "2048", "--sleep-on-idle")
    assert layout(server) == [(0, 2), (2, 2)]
    streams = Streams(server, ids, 96)
    for level in (4, 2, 4):
        streams.wait_for(2 + min(len(each.chunks) for each in streams.streams))
        report = instances(server, level=level)
    assert report["instances"][0]["requests"] > 0, "all streams have ended before the last change"
    assert server.generate(long, 8).tokens == expected_long
    assert streams.tokens() == expected
    assert server.state["instances"]["epoch"] == 3


@pytest.mark.full
def test_a_merged_instance_that_frees_weights_holds_longer_requests(servers, tmp_path):
    write_random_model(
        tmp_path, hidden_size=64, intermediate_size=30_000, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    model = ("--dtype", "float32", "--model-path", str(tmp_path))
    ids = [each for each in prompts(12, 150) if len(each) > 3][::2]
    long = prompts(2, 1200)[1]
    expected, expected_long = answers_of_stock(servers, model, ids, 48, long)

    flags = ("--tp-size", "2", "--instances", "2", "--merge-weights", "free", "--max-total-tokens", "1024")
    server = servers.get(*model, *flags, "--sleep-on-idle")
    streams = Streams(server, ids, 48)
    streams.wait_for(3)
    merged = instances(server, level=2)
    assert merged["instances"][0]["capacity"] > len(long) > 1024
    assert merged["changes"][0]["phases"]["weights"] > 0
    assert server.generate(long, 8).tokens == expected_long
    split = instances(server, level=1)
    assert [each["capacity"] for each in split["instances"]] == [CAPACITY, CAPACITY]
    assert streams.tokens() == expected
    body = {"input_ids": long, "sampling_params": {"max_new_tokens": 8}}
    response = requests.post(server.url + "/generate", json=body, timeout=60)
    assert response.status_code == 400 and "merge to 2 ranks" in response.text


@pytest.mark.full
def test_the_paper_policy_merges_for_a_long_request_and_splits_after_it(servers, reference):
    server = servers.get(*TWO, "--instance-policy", "paper")
    ids, expected = next(
        (ids, answer) for ids, answer in zip(reference.prompts, reference.answers[16], strict=True) if len(ids) > 600
    )
    assert layout(server) == [(0, 1), (1, 1)]
    assert_same_answers([server.generate(ids, 8)], [expected])
    assert layout(server) == [(0, 2)]
    deadline = time.monotonic() + 60
    while layout(server) != [(0, 1), (1, 1)]:
        assert time.monotonic() < deadline, "no request needs the merged instance"
        time.sleep(0.2)


@pytest.mark.full
def test_tokens_stay_in_order_with_several_detokenizers(servers, reference):
    """A router stands before them. A receipt of any of them says that the router has read the messages before."""
    server = servers.get(*TWO, "--detokenizer-worker-num", "2")
    streams = Streams(server, [reference.prompts[8 * i] for i in range(STREAMS)])
    streams.wait_for(3)
    for level in (2, 1):
        assert instances(server, level=level)["changes"][0]["ok"]
    assert streams.tokens() == [each.tokens for each in reference.tokens_64[:STREAMS]]


@pytest.mark.full
@pytest.mark.parametrize("name", ["instance_controller", "_TP0"])
def test_a_process_that_dies_ends_the_server(reference, servers, name):
    """Each request ends with its answer or with an error, and SGLang does not wait for dumps of the rank that lives.

    The first rank stands still before it gets requests. So its requests cannot end before the server notices the death,
    however fast this machine is. The requests of the other rank can.
    """
    server = servers.get(*TWO)
    process = child_process(server, name)
    child_process(server, "_TP0").suspend()
    with ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(server.generate, reference.prompts[8 * i], NEW_TOKENS) for i in range(STREAMS)]
        deadline = time.monotonic() + 120
        while not (stuck := requests_of_first_rank(server)):
            assert time.monotonic() < deadline, "the first rank got no request"
            time.sleep(0.05)
        process.kill()
        ends = [tokens_or_error(future) for future in running]
    for tokens, expected in zip(ends, reference.tokens_64, strict=False):
        assert tokens in (None, expected.tokens)
    assert ends.count(None) >= stuck
    assert server.process.wait(120) != 0
    assert "crash diagnostics" not in server.tail()
    assert not surviving_processes(server.process.pid)
    servers.stop()


def requests_of_first_rank(server: Server) -> int:
    """How many requests the controller has sent to the first instance, and not seen the end of."""
    report = requests.get(server.url + "/shift/instances", timeout=60).json()
    count: int = report["instances"][0]["requests"]
    return count


def tokens_or_error(running: Future[Answer]) -> list[int] | None:
    """The tokens of a request; None if it ended with an error. A request that does not end fails the test."""
    try:
        return running.result(timeout=120).tokens
    except (requests.RequestException, AssertionError):
        return None
