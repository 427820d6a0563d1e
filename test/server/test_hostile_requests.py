"""What a client sends never ends the server: after each odd request it answers normal ones as before, in both modes."""

from __future__ import annotations

import json
import shutil
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from harness import MIXED_CHUNKS
from safetensors.torch import load_file, save_file
from two_layers import two_layer_model

pytestmark = pytest.mark.server(*MIXED_CHUNKS)

IDS = list(range(200, 230))
VOCAB = 4096
NORMAL = [list(range(100, 140)), list(range(100, 105))]  # prefilled in SP, in TP; decoded in TP


@pytest.fixture(scope="module")
def server(servers):
    return servers.get(*MIXED_CHUNKS)


@pytest.fixture(scope="module")
def expected(server):
    server.flush_cache()
    before = server.state["steps"]
    answers = [server.generate(ids, 4).tokens for ids in NORMAL]
    after = server.state["steps"]
    assert all(after[mode] > before[mode] for mode in ("tp", "sp"))
    return answers


@pytest.fixture(autouse=True)
def still_serves(server, expected):
    yield
    server.flush_cache()
    assert [server.generate(ids, 4).tokens for ids in NORMAL] == expected


def send(server, path, body, timeout=60):
    data = body if isinstance(body, str) else json.dumps(body)
    return requests.post(server.url + path, data=data, headers={"Content-Type": "application/json"}, timeout=timeout)


def generate(sampling=None, **fields):
    if not isinstance(sampling, list):
        sampling = {"max_new_tokens": 4, "temperature": 0, **(sampling or {})}
    body = {"input_ids": IDS, **fields, "sampling_params": sampling}
    return "/generate", {name: value for name, value in body.items() if value is not None}


def completion(prompt, **fields):
    return "/v1/completions", {"model": "x", "prompt": prompt, "max_tokens": 4, **fields}


def vertex(**sampling):
    """SGLang's route whose sampling parameters may have any types; ``/generate`` checks them."""
    return "/vertex_generate", {"instances": [{"input_ids": IDS}], "parameters": {"sampling_params": sampling}}


def score_with_row(row):
    """A score, of a query whose second token is replaced by ``row``."""
    replaced = {"embed_override_token_id": 7, "query_embed_overrides": [row]}
    return "/v1/score", {"model": "x", "query": [5, 7], "items": [[6]], "label_token_ids": [1], **replaced}


# These ended a server or had it answer no one, apart from three ("token above", "top_logprobs_num", "override of
# one number") that were answered with nonsense.
ENDED = {
    "no tokens": (generate(input_ids=[[], []]), "has no tokens"),
    "one without tokens": (generate(input_ids=[[5, 6], []]), "has no tokens"),
    "no tokens, several samples": (generate({"n": 3}, input_ids=[[]]), "has no tokens"),
    "no text": (generate(input_ids=None, text=""), "has no tokens"),
    "no texts": (generate(input_ids=None, text=["", ""]), "has no tokens"),
    "samples without end": (generate({"n": 2**31}), "n is 2147483648"),
    "samples without end, OpenAI": (completion("a", n=10**9), "n is 1000000000"),
    "top_k": (generate({"top_k": 2**31, "temperature": 1}), "top_k is 2147483648"),
    "top_k, OpenAI": (completion("a", top_k=2**40), "top_k is 1099511627776"),
    "stop token below": (generate({"stop_token_ids": [-1], "min_new_tokens": 2}), "stop_token_ids has -1"),
    "stop token above": (generate({"stop_token_ids": [2**62], "min_new_tokens": 2}), f"stop_token_ids has {2**62}"),
    "token below, as text": (
        generate(input_ids=[-5, 3, 4], return_logprob=True, logprob_start_len=0, return_text_in_logprobs=True),
        "input_ids has -5",
    ),
    "token above": (generate(input_ids=[3, VOCAB, 4]), f"input_ids has {VOCAB}"),
    "logprob_start_len": (generate(return_logprob=True, logprob_start_len=-2), "logprob_start_len is -2"),
    "top_logprobs_num": (generate(return_logprob=True, top_logprobs_num=-1), "top_logprobs_num is -1"),
    "samples of many prompts": (generate({"n": 100}, input_ids=[[5]] * 1000), "n is 100, for 1000 prompts,"),
    "logit_bias of text": (vertex(logit_bias={"1": "x"}), "logit_bias has a value of another type"),
    "logit_bias as a list": (vertex(logit_bias=[1]), "logit_bias has a value of another type"),
    "skip_special_tokens of text": (vertex(skip_special_tokens="x"), "skip_special_tokens has a value of"),
    "label that no metric has": (generate(custom_labels={"x": "y"}), "custom_labels has 'x'"),
    "logprobs at no token": (
        generate({"max_new_tokens": 0}, token_indices_to_pool=[10**6], return_logprob=True, token_ids_logprob=[5]),
        "token_indices_to_pool needs",
    ),
    "override of one number": (score_with_row([0.1]), "override tokens have the shape (1, 1)"),
    "override of two numbers": (score_with_row([0.1, 0.2]), "override tokens have the shape (1, 2)"),
    "overrides": (generate(positional_embed_overrides={"embeds": []}), "positional_embed_overrides has tensors"),
}


@pytest.mark.parametrize("name", ENDED)
def test_a_request_that_would_end_a_rank_is_an_error(server, name):
    (path, body), reason = ENDED[name]
    response = send(server, path, body)
    assert response.status_code == 400 and reason in response.text, response.text


ODD = {
    "no ids": generate(input_ids=[]),
    "no prompt": completion(""),
    "no prompts": completion(["", ""]),
    "a prompt of no tokens": completion([[]]),
    "huge ids": generate(input_ids=[2**62] * 3),
    "ids of text": generate(input_ids=["a"]),
    "too long": generate(input_ids=[5] * 5000),
    "max_new_tokens below 0": generate({"max_new_tokens": -1}),
    "max_new_tokens 0": generate({"max_new_tokens": 0}),
    "max_new_tokens huge": generate({"max_new_tokens": 2**62}),
    "max_new_tokens text": generate({"max_new_tokens": "5"}),
    "min_new_tokens above": generate({"min_new_tokens": 9}),
    "temperature below 0": generate({"temperature": -1}),
    "temperature NaN": ("/generate", '{"input_ids": [1, 2], "sampling_params": {"temperature": NaN}}'),
    "temperature huge": generate({"temperature": 1e308}),
    "tiny repetition penalty": generate({"repetition_penalty": 1e-300, "temperature": 1}),
    "n 0": generate({"n": 0}),
    "n below 0": generate({"n": -1}),
    "n 40": generate({"n": 40, "temperature": 1}),
    "stop": generate({"stop": [""]}),
    "stop_regex": generate({"stop_regex": "("}),
    "logit_bias of no token": generate({"logit_bias": {"-1": 1}}),
    "logit_bias beyond floats": generate({"logit_bias": {"1": 1e39}, "temperature": 1}),
    "regex": generate({"regex": "("}),
    "regex without end": generate({"regex": "a{1000000}"}),
    "ebnf": generate({"ebnf": "root ::= root"}),
    "json schema": generate({"json_schema": '{"$ref": "#/nowhere"}'}),
    "json schema of itself": generate({"json_schema": '{"$ref": "#"}'}),
    "structural tag": generate({"structural_tag": "{"}),
    "custom_params": generate({"custom_params": {"a": {"b": [1, {"c": 2}]}}}),
    "unknown parameter": generate({"nonsense": 1}),
    "all logprobs": generate(return_logprob=True, logprob_start_len=0, top_logprobs_num=VOCAB),
    "logprob_start_len above": generate(return_logprob=True, logprob_start_len=2**40),
    "token_ids_logprob": generate(return_logprob=True, token_ids_logprob=[-1]),
    "rid twice": generate(input_ids=[[1], [2]], rid=["a", "a"]),
    "rid of a health check": generate(rid="HEALTH_CHECK_1"),
    "no such session": generate(session_params={"id": "nobody"}),
    "odd session": generate(session_params={"x": 1}),
    "priority": generate(priority=2**70),
    "embeddings": generate(input_ids=None, input_embeds=[[0.1] * 7] * 3),
    "image": generate(image_data="x"),
    "LoRA": generate(lora_path="x"),
    "hidden states": generate(return_hidden_states=True),
    "logit processor": generate(custom_logit_processor="x"),
    "bootstrap": generate(bootstrap_host="x", bootstrap_port=5, bootstrap_room=7),
    "data-parallel rank": generate(routed_dp_rank=99),
    "stream interval": generate({"stream_interval": 0}, stream=True),
    "a number for a flag": vertex(skip_special_tokens=1, ignore_eos=1, max_new_tokens=4.0),
    "max_new_tokens 4.5": vertex(max_new_tokens=4.5),
    "min_new_tokens 1.5": vertex(min_new_tokens=1.5),
    "top_k 5.5": vertex(top_k=5.5, temperature=1),
    "schema as a map": vertex(json_schema={"type": "object"}),
    "schema of half a character": generate({"json_schema": "\ud800"}),
    "stop of half a character": generate({"stop": "\ud800"}),
    "regex of half a character": generate({"regex": "\ud800"}),
    "beam": generate({"beam_width": 2, "n": 2}),
    "beams without end": generate({"beam_width": 10**9}),
    "beams of a half": generate({"beam_width": 2.5}),
    "sampling mask": generate({"top_k": 5, "temperature": 1}, return_sampling_mask=True),
    "sampling mask of all": generate(return_sampling_mask=True, sampling_logprobs_mode="support"),
    "routed experts": generate(return_routed_experts=True, routed_experts_start_len=-5),
    "indexer": generate(return_indexer_topk=True),
    "flat logprobs": generate(return_flat_raw_output_top_logprobs=True, return_flat_raw_top_logprobs=True),
    "flat logprobs of none": generate(return_flat_raw_output_top_logprobs=True, return_logprob=True),
    "flat logprobs of the prompt": generate(
        return_flat_raw_top_logprobs=True,
        return_logprob=True,
        top_logprobs_num=3,
        logprob_start_len=0,
        return_flat_raw_top_logprobs_b64=True,
    ),
    "worker": generate(http_worker_ipc="ipc:///nowhere"),
    "delimiters": generate({"max_new_tokens": 0}, multi_item_delimiter_indices=[10**6], return_logprob=True),
    "waits for images": generate(need_wait_for_mm_inputs=True, num_items_assigned={}, encoder_urls=["x"]),
    "received never": ("/generate", '{"input_ids": [1, 2], "received_time": NaN, "sampling_params": {}}'),
    "keys of the cache": generate(extra_key="\u0000", cache_salt="x", routing_key="y"),
    "hints": generate(kv_hints={"version": "x"}),
    "hidden states of a list": generate(return_hidden_states=[True]),
    "logprobs of a list": generate(return_logprob=[True], top_logprobs_num=[1]),
    "budget of text": generate({"custom_params": {"thinking_budget": "x"}, "regex": "a+"}, require_reasoning=True),
    "terminator": generate({"custom_params": {"__sglang_reasoning_end_token_ids": [1]}}),
    "watermark": generate(watermark={"x": 1}),
    "streams of three": generate({"n": 3, "temperature": 1}, stream=True, return_logprob=True),
    "a bad one of three": generate([{}, {"regex": "("}, {}], input_ids=[[5], [6], [7]]),
    "logit_bias, OpenAI": completion("a", logit_bias={"-1": 5}),
    "responses": ("/v1/responses", {"model": "x", "input": "a", "max_output_tokens": 4, "top_logprobs": 99}),
    "messages": ("/v1/messages", {"model": "x", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]}),
    "tools": (
        "/v1/chat/completions",
        {
            "model": "x",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 4,
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}],
        },
    ),
    "not JSON": ("/generate", "{"),
    "deep": ("/generate", "[" * 100_000),
    "encode": ("/encode", {"input_ids": []}),
    "score": ("/v1/score", {"model": "x", "query": "", "items": [""], "label_token_ids": [-1]}),
    "embed": ("/v1/embeddings", {"model": "x", "input": ""}),
    "no messages": ("/v1/chat/completions", {"model": "x", "messages": []}),
    "completion n 0": completion("a", n=0),
    "completion logprobs": completion("a", logprobs=100_000),
    "completion response format": completion("a", response_format={"type": "json_schema"}),
    "session": ("/open_session", {"capacity_of_str_len": -1, "session_id": ""}),
    "close": ("/close_session", {"session_id": "nobody"}),
    "abort": ("/abort_request", {"rid": "nobody"}),
    "detokenize": ("/detokenize", {"model": "x", "tokens": [-1, 2**70]}),
    "internal state of floats": ("/set_internal_state", '{"server_args": {"shift_threshold": 1.5}}'),
    "internal state of NaN": ("/set_internal_state", '{"server_args": {"shift_threshold": NaN}}'),
    "internal state huge": ("/set_internal_state", '{"server_args": {"shift_threshold": 1e300}}'),
    "internal state text": ("/set_internal_state", '{"server_args": {"shift_policy": [1]}}'),
    "a step of no time": ("/slow_down", '{"forward_sleep_time": NaN}'),
    "profile stopped": ("/stop_profile", {}),
    "weights in no format": ("/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "x"}),
    "weights from nowhere": ("/update_weights_from_disk", {"model_path": "/nowhere"}),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_answered(server, name):
    assert send(server, *ODD[name]).status_code < 600


OPERATORS = {
    "profile into a file": (("/start_profile", {"output_dir": "/dev/null/x"}), "cannot be written"),
    "profile with a folder in its name": (("/start_profile", {"profile_prefix": "a/b"}), "is no part of a file's name"),
    "profile of a GPU's memory": (("/start_profile", {"activities": ["MEM"]}), "activities has 'MEM'"),
    "profile of stages": (("/start_profile", {"profile_by_stage": True}), "give num_steps"),
    "start of no recorder": (("/start_expert_distribution_record", {}), "records no experts"),
    "stop of no recorder": (("/stop_expert_distribution_record", {}), "records no experts"),
    "dump of no recorder": (("/dump_expert_distribution_record", {}), "records no experts"),
    "memory of CPUs": (("/release_memory_occupation", {}), "on GPUs only"),
    "memory that was not released": (("/resume_memory_occupation", {}), "on GPUs only"),
    "a step that never ends": (("/slow_down", {"forward_sleep_time": 1e300}), "at most 3600 seconds"),
    "weights of too few ranks": (("/update_weights_from_tensor", {"serialized_named_tensors": []}), "one for each of"),
    "weights in a format of another loader": (
        ("/update_weights_from_disk", {"model_path": "/nowhere", "load_format": "private"}),
        "does not update weights",
    ),
    "a trainer's group without a name": (
        (
            "/init_weights_update_group",
            {"master_address": "localhost", "master_port": 1, "rank_offset": 1, "world_size": 3, "group_name": ""},
        ),
        "group_name is empty",
    ),
    "export to a group of one port": (
        (
            "/init_weights_send_group_for_remote_instance",
            {"master_address": "localhost", "ports": "1", "group_rank": 0, "world_size": 2},
        ),
        "cannot be exported shard by shard",
    ),
    "logging of no level": (("/configure_logging", {"log_requests_level": 99}), "between 0 and 3"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_request_of_an_operator_that_would_end_a_rank_is_an_error(server, name):
    (path, body), reason = OPERATORS[name]
    response = send(server, path, body)
    assert response.status_code == 400 and reason in response.text, response.text


def test_a_checkpoint_that_does_not_load(server, tmp_path):
    """The ranks have loaded parts of it by then, and SGLang's rollback would read it once more."""
    folder = shutil.copytree(two_layer_model(), tmp_path / "reshaped")
    tensors = load_file(folder / "model.safetensors")
    name = max(name for name in tensors if "layers" in name)
    save_file({**tensors, name: torch.zeros(3)}, folder / "model.safetensors")
    response = send(server, "/update_weights_from_disk", {"model_path": str(folder)})
    assert response.status_code == 400 and "were loaded again" in response.text, response.text


def test_sessions(server):
    """Turns that replace, cut and repeat what was; a session that is closed in between."""
    send(server, "/open_session", {"capacity_of_str_len": 1000, "session_id": "s"})
    turns = [
        {"rid": "a"}, {"rid": "b", "session": {"rid": "a"}}, {"rid": "b", "session": {"rid": "nobody"}},
        {"input_ids": [], "session": {"rid": "b"}}, {"input_ids": [], "session": {"rid": "a", "offset": -(10**6)}},
        {"session": {"rid": "a", "offset": 10**9}}, {"session": {"rid": "a", "replace": True}}, {"input_ids": []},
        {"session": {"rid": "a", "offset": "x"}}, {"session": {"rid": ["a"]}}, {"session": {"id": ["s"]}},
        {"rid": "c"}, {"session": {"replace": True}},  # each of this line and the one above ended the server
    ]  # fmt: skip
    for turn in turns:
        session = {"id": "s", **turn.pop("session", {})}
        send(server, *generate(**{"input_ids": IDS, **turn}, session_params=session))
    send(server, "/close_session", {"session_id": "s"})
    send(server, *generate(session_params={"id": "s", "rid": "a"}))


def test_stop_tokens_in_an_order_of_their_own(server):
    """The rank-consensus checker took the orders of 15 and 7, in the sets of two ranks, for a divergence."""
    assert send(server, *generate({"stop_token_ids": [7, 15]})).status_code == 200


def test_a_grammar_after_reasoning(server):
    """The checker took the addresses of two ranks' grammar objects for a divergence."""
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    assert send(server, *generate({"json_schema": schema}, require_reasoning=True)).status_code == 200
    assert send(server, *generate({"json_schema": schema})).status_code == 200


def test_clients_that_leave(server):
    """Streams whose clients disconnect at once or in the middle, and requests that are never sent whole."""
    _, body = generate({"max_new_tokens": 300, "ignore_eos": True}, stream=True)
    text = json.dumps(body).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connections = []
    for i in range(30):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head % len(text) + (text if i % 3 else text[:9]))
        connections.append(connection)
        if i % 2:
            connection.close()
    assert send(server, *generate()).status_code == 200  # while they idle
    for connection in connections:
        connection.close()


def test_a_hundred_requests_aborted_at_once(server):
    def ask(i):
        fields = {"input_ids": [i + 3] * 30, "rid": f"doomed-{i}"}
        return send(server, *generate({"max_new_tokens": 1000, "ignore_eos": True}, **fields), timeout=120)

    with ThreadPoolExecutor(100) as pool:
        doomed = [pool.submit(ask, i) for i in range(100)]
        while not any(future.done() for future in doomed):
            send(server, "/abort_request", {"abort_all": True})
        while not all(future.done() for future in doomed):
            send(server, "/abort_request", {"abort_all": True})
    kinds = Counter(future.result().json()["meta_info"]["finish_reason"]["type"] for future in doomed)
    assert kinds["abort"] > 0 and sum(kinds.values()) == 100, kinds
