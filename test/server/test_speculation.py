"""Speculative decoding: drafts are verified in both modes, and the answers are those without speculation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import exp, sqrt
from pathlib import Path

import pytest
import requests
from harness import TWO_RANKS
from prompts import assert_same_answers
from two_layers import two_layer_model

DRAFTS = 4
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(DRAFTS))


@pytest.fixture(scope="module")
def server(reference, servers):
    return servers.get(*TWO_RANKS, *NGRAM)


def accepted(answers):
    """Tokens of the answers that came from accepted drafts: a step gives one token without them."""
    return sum(len(answer.tokens) - 1 - answer.meta["spec_verify_ct"] for answer in answers)


@pytest.mark.server
@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_answers_as_without_speculation(server, reference, policy, concurrency):
    with server.policy(policy, threshold=2 * DRAFTS) as steps:
        answers = server.generate_all(reference.prompts[::2], concurrency)
    assert_same_answers(answers, reference.answers[concurrency][::2])
    assert (steps["tp"] > 0, steps["sp"] > 0) == {"tp": (True, False), "sp": (False, True), "tokens": (True, True)}[
        policy
    ]
    assert accepted(answers) > 0


@pytest.mark.server
def test_a_step_counts_the_drafts_that_it_verifies(server, reference):
    """One request: each decode step has 4 tokens, so the threshold decides between the modes."""
    server.flush_cache()
    for threshold, mode in ((DRAFTS - 1, "sp"), (DRAFTS, "tp")):
        before = server.state
        with server.policy("tokens", threshold=threshold):
            answer = server.generate(reference.prompts[0], 16)
        after = server.state
        assert len(reference.prompts[0]) == 1, "the prefill runs in TP"
        steps = after["steps"][mode] - before["steps"][mode]
        tokens = after["tokens"][mode] - before["tokens"][mode]
        prefills = 1 if mode == "tp" else 0
        assert steps - prefills == answer.meta["spec_verify_ct"]
        assert tokens - prefills == DRAFTS * answer.meta["spec_verify_ct"]


@pytest.mark.server
def test_json_schema(server):
    """A grammar limits drafts, too."""
    server.flush_cache()
    sampling = {"temperature": 0, "max_new_tokens": 24, "regex": r"[0-9]{3}-[0-9]{4}"}
    answer = server.post("/generate", {"text": "import re\n\nPHONE = '", "sampling_params": sampling})
    assert [len(part) for part in answer["text"].split("-")] == [3, 4]


SAMPLED = {
    "only temperature": {"temperature": 1},
    "SGLang's temperature": {"temperature": None},
    "top-p and top-k": {"temperature": 1, "top_p": 0.9, "top_k": 5},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "penalties": {"temperature": 1, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "min_new_tokens": 4},
    "a seed": {"temperature": 1, "sampling_seed": 7},
    "min_p without a need": {"temperature": 0, "min_p": 0.1},
}


def sampled(server, ids, number, sampling, top=0):
    """Tokens of an answer, and the logprobs of the ``top`` tokens at each place."""
    sampling = {"max_new_tokens": number, "ignore_eos": True, **sampling}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": top}
    answer = server.post("/generate", body)
    assert all(entry[0] <= 0 for entry in answer["meta_info"]["output_token_logprobs"])
    return answer["output_ids"], answer["meta_info"].get("output_top_logprobs")


@pytest.mark.server
def test_sampled_requests_beside_greedy_ones(server, reference):
    """These ended a server without a GPU. A step with both kinds answers the greedy ones as ever."""
    chosen = slice(16, 24)
    server.flush_cache()
    with server.policy("tokens", threshold=2 * DRAFTS), ThreadPoolExecutor(16) as pool:
        others = [pool.submit(sampled, server, reference.prompts[20], 8, case) for case in SAMPLED.values()]
        greedy = list(pool.map(server.generate, reference.prompts[chosen]))
        answers = [other.result()[0] for other in others]
    assert_same_answers(greedy, reference.answers[16][chosen])
    assert [len(tokens) for tokens in answers] == [8] * len(SAMPLED)
    assert answers[-1] == reference.answers[1][20].tokens


@pytest.mark.server
def test_sampled_tokens_obey_their_limits(server, reference):
    ids = reference.prompts[30]
    tokens, top = sampled(server, ids, 16, {"temperature": 1, "top_k": 3}, top=3)
    assert all(token in [entry[1] for entry in place] for token, place in zip(tokens, top, strict=True))
    assert sampled(server, ids, 6, {"temperature": 1, "logit_bias": {"77": 100.0}})[0] == [77] * 6
    grammar = {"temperature": 1, "max_new_tokens": 24, "regex": r"[0-9]{3}-[0-9]{4}"}
    answer = server.post("/generate", {"text": "import re\n\nPHONE = '", "sampling_params": grammar})
    assert [len(part) for part in answer["text"].split("-")] == [3, 4]


@pytest.mark.server
def test_sampled_tokens_have_their_probabilities(server, reference):
    """Each place has two tokens to choose from. The better one is taken as often as its share of both says."""
    with ThreadPoolExecutor(16) as pool:
        ids = [reference.prompts[i] for i in range(16, 40)] * 4
        answers = list(pool.map(lambda each: sampled(server, each, 12, {"temperature": 1, "top_k": 2}, top=2), ids))
    shares = list(better(answers))
    expected, variance = sum(share for share, _ in shares), sum(share * (1 - share) for share, _ in shares)
    assert variance > 50, "else the places would say nothing"
    assert abs(sum(taken for _, taken in shares) - expected) < 5 * sqrt(variance)


def better(answers) -> Iterator[tuple[float, bool]]:
    """For each place after the first, the share of the better of two tokens, and whether it was taken."""
    for tokens, top in answers:
        for token, ((first, best, _), (second, _, _)) in list(zip(tokens, top, strict=True))[1:]:
            yield 1 / (1 + exp(second - first)), token == best


@pytest.mark.server
def test_what_drafts_leave_out_is_refused(server):
    body = {"text": "a", "sampling_params": {"temperature": 1, "min_p": 0.1}}
    refusal = requests.post(server.url + "/generate", json=body, timeout=60)
    assert refusal.status_code == 400 and "min_p is 0.1, but --speculative-algorithm" in refusal.text


@pytest.mark.server
@pytest.mark.full
def test_calibrated(servers, reference):
    flags = ("--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--max-running-requests", "4")
    server = servers.get(*flags, *NGRAM)
    assert server.state["calibration"].startswith("calibrat")
    assert server.state["costs"] is not None
    assert_same_answers(server.generate_all(reference.prompts[::8], 4), reference.answers[16][::8])


STEPS = ("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
DRAFT_MODELS = {"EAGLE": "LlamaForCausalLMEagle", "EAGLE3": "LlamaForCausalLMEagle3"}


@pytest.fixture(scope="module")
def draft_flags(request, tmp_path_factory):
    """The flags of an algorithm with a draft model.

    STANDALONE takes a whole model: here it is the served model itself, so many drafts are accepted. Not all are,
    because SGLang leaves out the first token of a prompt. EAGLE's models get hidden states of the served model. They
    have random weights here.
    """
    algorithm = request.param
    flags = ("--speculative-algorithm", algorithm, *STEPS)
    if algorithm == "STANDALONE":
        return (*flags, "--speculative-draft-model-path", two_layer_model())
    folder = tmp_path_factory.mktemp(algorithm)
    config = json.loads(Path(two_layer_model(), "config.json").read_text())
    changes = {"architectures": [DRAFT_MODELS[algorithm]], "num_hidden_layers": 1, "draft_vocab_size": None}
    changes["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [-1, 0]}  # EAGLE3 reads embeddings and layer 0
    Path(folder, "config.json").write_text(json.dumps({**config, **changes, "tie_word_embeddings": False}))
    return (*flags, "--speculative-draft-model-path", str(folder), "--speculative-draft-load-format", "dummy")


@pytest.mark.server
@pytest.mark.full
@pytest.mark.parametrize("draft_flags", ["STANDALONE", *DRAFT_MODELS], indirect=True)
def test_draft_models(servers, reference, draft_flags):
    """The draft model runs in TP. The answers are those without it, whatever the mode of the served model is."""
    server = servers.get(*TWO_RANKS, *draft_flags)
    for policy in ("tp", "sp", "tokens"):
        for concurrency, chosen in ((1, slice(None, None, 8)), (16, slice(None, None, 4))):
            with server.policy(policy, threshold=2 * DRAFTS) as steps:
                answers = server.generate_all(reference.prompts[chosen], concurrency)
            assert_same_answers(answers, reference.answers[concurrency][chosen])
            assert (steps["tp"] > 0, steps["sp"] > 0) == (policy != "sp", policy != "tp")
            if "STANDALONE" in draft_flags:
                assert accepted(answers) > 0
    assert len(sampled(server, reference.prompts[20], 8, SAMPLED["top-p and top-k"])[0]) == 8
