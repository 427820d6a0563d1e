"""The random model of the GPU check's servers: a comparison of logprobs sees attention, and not what is rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sglang_shift.models.random_model import write_random_model
from sglang_shift.tools.gpu_check.answers import make_prompts
from sglang_shift.tools.gpu_check.engine import MODEL, TOLERANCE, VOCABULARY
from transformers import LlamaForCausalLM

PROMPT = make_prompts(VOCABULARY)[-1]
FAR = 512
"""Tokens: a chunk, and less than the prompt."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, **MODEL)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def logprobs(model) -> torch.Tensor:
    """Of the prompt's tokens, as a server says them."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1].float()
    return logits.log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]


def changed_by(model, forwards: dict[torch.nn.Module, Callable]) -> float:
    """The largest change of a logprob where these modules compute something else."""
    expected = logprobs(model)
    with pytest.MonkeyPatch.context() as patched:
        for module, forward in forwards.items():
            patched.setattr(module, "forward", forward)
        return float((logprobs(model) - expected).abs().max())


def in_two(linear) -> Callable:
    """As two ranks compute it: each rounds its part of the sum."""
    weights = linear.weight.chunk(2, dim=1)
    return lambda x: sum(F.linear(part, weight) for part, weight in zip(x.chunk(2, dim=-1), weights, strict=True))


def without_far_tokens(linear) -> Callable:
    """Attention would read nothing there."""
    return lambda x: F.linear(x, linear.weight) * (torch.arange(x.shape[1]) < FAR)[:, None]


def with_far_tokens_moved(linear) -> Callable:
    """As if they were one position further on."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        near, far = F.linear(x, linear.weight).tensor_split([FAR], dim=1)
        return torch.cat([near, far.roll(1, dims=1)], dim=1)

    return forward


def test_what_two_ranks_round_is_tolerated(model):
    linears = [linear for layer in model.model.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    assert 0 < changed_by(model, {linear: in_two(linear) for linear in linears}) < TOLERANCE / 1.5


@pytest.mark.parametrize("layer", range(MODEL["num_hidden_layers"]))
@pytest.mark.parametrize(("name", "wrong"), [("v_proj", without_far_tokens), ("k_proj", with_far_tokens_moved)])
def test_wrong_attention_over_a_long_context_is_not(model, layer, name, wrong):
    linear = getattr(model.model.layers[layer].self_attn, name)
    assert changed_by(model, {linear: wrong(linear)}) > 1.5 * TOLERANCE
