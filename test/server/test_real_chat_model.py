"""A real chat model in every mode against Hugging Face transformers: SmolLM2-135M-Instruct with three ranks.

It has 9 heads and 3 KV heads. Random models choose between tokens that mean nothing, and their states stay small. The
states of a real model have a few very large values, and its answers are text.
"""

from __future__ import annotations

import inspect
import os
import textwrap
from pathlib import Path

import pytest
import smollm2
import torch
from harness import Answer, shift_flags
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]

NEW_TOKENS = 16
LONG = 1300  # tokens of the text that is too long for one chunk
QUESTION = "What is the capital of France?"
CHATS = [
    [{"role": "user", "content": QUESTION}],
    [{"role": "user", "content": "Write a short poem about the sea."}],
    [{"role": "user", "content": "Explain in one sentence why the sky is blue."}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is the Earth round?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And what colour is grass?"},
    ],
]


class RealModel:
    """The checkpoint, and what transformers answers."""

    def __init__(self, file: Path, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.path = str(folder)
        self.model = smollm2.write(file, folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        code = self.tokenizer.decode(self.tokenizer.encode(inspect.getsource(textwrap))[:LONG])
        chats = [*CHATS, [{"role": "user", "content": f"What does this Python module do?\n\n{code}"}]]
        self.prompts = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
        self.answers = [self.greedy(ids) for ids in self.prompts]

    @torch.no_grad()
    def greedy(self, ids: list[int]) -> Answer:
        """Return the likeliest tokens, also after the end of the answer."""
        tokens, logprobs, cache = [], [], None
        new = torch.tensor([ids])
        for _ in range(NEW_TOKENS):
            output = self.model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best = output.logits[0, -1].log_softmax(-1).max(-1)
            tokens.append(int(best.indices))
            logprobs.append(float(best.values))
            new, cache = best.indices.view(1, 1), output.past_key_values
        return Answer(tokens, logprobs, {})


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    file = smollm2.find()
    if file is None:
        missing = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        missing("the weights are not installed: run scripts/chat_model.sh")
    return RealModel(file, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture
def server(servers, real_model):
    flags = (*shift_flags(3, 3), "--chunked-prefill-size", "512", "--max-total-tokens", "8192")
    return servers.get("--model-path", real_model.path, *flags)


@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_answers_as_transformers(policy, server, real_model):
    """One request alone, then all at once. Prompts are tens of tokens long, and the last one has three chunks."""
    assert len(real_model.prompts[-1]) > 1200
    with server.policy(policy, 8) as steps:
        answers = server.generate_all(real_model.prompts[:1], 1, NEW_TOKENS)
        answers += server.generate_all(real_model.prompts, len(real_model.prompts), NEW_TOKENS)
    assert {mode for mode, count in steps.items() if count} == ({"tp", "sp"} if policy == "tokens" else {policy})
    assert_same_answers(answers, real_model.answers[:1] + real_model.answers)


def test_a_chat(server, real_model):
    """The chat template and the end of the answer are those of the checkpoint."""
    body = {"model": "", "messages": CHATS[0], "temperature": 0, "max_tokens": NEW_TOKENS}
    choice = server.post("/v1/chat/completions", body)["choices"][0]
    tokens = real_model.answers[0].tokens
    end = tokens.index(real_model.tokenizer.eos_token_id)
    assert choice["message"]["content"] == real_model.tokenizer.decode(tokens[:end])
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"


def test_the_modes_compute_the_same(server):
    """The check at start-up takes the real model's large states for what they are."""
    assert "the modes compute the same (SP is within" in server.log.read_text(errors="replace")
