"""Speculative decoding: drafts are verified in both modes, and the answers are those without speculation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import TWO_RANKS
from prompts import assert_same_answers
from sglang_shift.models.demo import demo_model_path

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
        return (*flags, "--speculative-draft-model-path", demo_model_path())
    folder = tmp_path_factory.mktemp(algorithm)
    config = json.loads(Path(demo_model_path(), "config.json").read_text())
    changes = {"architectures": [DRAFT_MODELS[algorithm]], "num_hidden_layers": 1, "draft_vocab_size": None}
    changes["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}  # EAGLE3 reads these layers
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
