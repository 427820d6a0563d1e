"""What requests ask for beyond tokens: each answer of SP, and of both modes by turns, is the answer of TP."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import SMALL_CHUNKS
from prompts import assert_same_answers
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang_shift.models.demo import demo_model_path

FLAGS = (
    "--model-path", demo_model_path(),  # all of its layers end the JSON of a tool call in time
    *SMALL_CHUNKS, "--enable-return-hidden-states", "--enable-custom-logit-processor", "--enable-priority-scheduling",
    "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3",
)  # fmt: skip
pytestmark = [pytest.mark.server(*FLAGS), pytest.mark.full]

TOLERANCE = 1e-3
IDS = [100 + 7 * i for i in range(200)]  # two chunks
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}'
TOOL = {
    "type": "function",
    "function": {
        "name": "open_file",
        "parameters": {"type": "object", "properties": {"mode": {"enum": ["read", "write"]}}, "required": ["mode"]},
    },
}
MESSAGES = [{"role": "user", "content": "Write is_empty: Return True if the queue is empty. " * 3}]


def generate(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, **(sampling or {})}
    return "/generate", {"input_ids": IDS, "sampling_params": sampling, **fields}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 24, **fields}


REQUESTS = {
    "logprobs of the input, the best ones and chosen ones": generate(
        return_logprob=True, logprob_start_len=0, top_logprobs_num=3, token_ids_logprob=[5, 700, 4000]
    ),
    "logprobs from the middle of a chunk": generate(return_logprob=True, logprob_start_len=50, top_logprobs_num=2),
    "hidden states": generate(return_hidden_states=True),
    "several answers": generate({"n": 3}, return_logprob=True),
    "penalties": generate(
        {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2, "min_new_tokens": 6},
        return_logprob=True,
    ),
    "logit bias": generate({"logit_bias": {"77": 100.0}}, return_logprob=True),
    "a custom logit processor": generate(
        {"custom_params": {"token_ids": list(range(2000))}},
        custom_logit_processor=DisallowedTokensLogitsProcessor().to_str(),
        return_logprob=True,
    ),
    "an EBNF grammar": generate({"ebnf": 'root ::= ("red" | "green") " " [0-9]+ "."', "ignore_eos": False}),
    "a JSON schema": generate({"json_schema": SCHEMA, "ignore_eos": False, "max_new_tokens": 40}),
    "a tool call": chat(
        tools=[TOOL], tool_choice="required", max_tokens=100, chat_template_kwargs={"enable_thinking": False}
    ),
    "reasoning": chat(separate_reasoning=True, logprobs=True, top_logprobs=2),
    "scores": ("/v1/score", {"query": IDS[:60], "items": [IDS[60:100], IDS[90:95]], "label_token_ids": [9, 90]}),
}


@pytest.fixture(scope="module")
def server(servers):
    return servers.get(*FLAGS)


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_those_of_tp(server, name):
    path, body = REQUESTS[name]
    answers = {}
    for policy in ("tp", "sp", "tokens"):
        server.flush_cache()
        with server.policy(policy, 20) as steps:
            answers[policy] = of_content(server.post(path, body))
        both = {"sp"} if name == "scores" else {"tp", "sp"}  # scores need no decode step
        assert {mode for mode, count in steps.items() if count} == (both if policy == "tokens" else {policy})
    assert same(answers["sp"], answers["tp"]), answers
    assert same(answers["tokens"], answers["tp"]), answers
    check(name, answers["tp"])


def check(name: str, answer: Any) -> None:
    """Check that the answer has what was asked for."""
    if name == "hidden states":
        rows = answer["meta_info"]["hidden_states"]
        assert len(rows) == 12 and len(rows[0][-1]) == len(rows[1])
    elif name == "several answers":
        assert len(answer) == 3
    elif name == "logit bias":
        assert answer["output_ids"] == [77] * 12
    elif name == "a custom logit processor":
        assert min(answer["output_ids"]) >= 2000
    elif name == "an EBNF grammar":
        assert answer["text"].split()[0] in ("red", "green")
    elif name == "a tool call":
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "open_file"


def of_content(answer: Any) -> Any:
    """Leave out what differs between two equal requests: names and times."""
    if isinstance(answer, list):
        return [of_content(each) for each in answer]
    if not isinstance(answer, dict):
        return answer
    kept = {name: value for name, value in answer.items() if not name.endswith(IGNORED)}
    return {name: of_content(value) for name, value in kept.items()}


IGNORED = ("id", "rid", "created", "latency", "time", "_ts", "throughput", "shift_steps", "metadata", "sglext")


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal up to rounding."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def test_a_session_continues_in_the_other_mode(server):
    """The second turn continues what the first one left in the KV cache. Together they are one long prompt."""
    first, second = IDS[:90], IDS[90:150]
    server.flush_cache()
    with server.policy("tp"):
        expected = server.generate(first, 6)
        whole = server.generate([*first, *expected.tokens, *second], 6)
    for order in (("sp", "tp"), ("tp", "sp")):
        server.flush_cache()
        session = {"id": f"turns in {order[0]} and {order[1]}"}
        server.post("/open_session", {"capacity_of_str_len": 1000, "session_id": session["id"]})
        with server.policy(order[0]):
            one = server.generate(first, 6, session_params=session)
        with server.policy(order[1]):
            two = server.generate(second, 6, session_params={**session, "rid": one.meta["id"]})
        server.post("/close_session", {"session_id": session["id"]})
        assert_same_answers([one, two], [expected, whole])


def test_priorities(server):
    """Requests of all priorities at once, some of which wait. The last steps are small."""
    prompts = [[n + 5 * i for i in range(30 + n)] for n in range(24)]
    answers = {}
    for policy in ("tp", "tokens"):
        server.flush_cache()
        with server.policy(policy, 20) as steps, ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(server.generate, ids, 4 + i, priority=i % 5) for i, ids in enumerate(prompts)]
            answers[policy] = [future.result() for future in asked]
    assert min(steps.values()) > 0
    assert_same_answers(answers["tokens"], answers["tp"])
