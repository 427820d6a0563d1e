"""Plain PyTorch in place of SGLang's kernels, against transformers and against the definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_shift.platforms import fallbacks

EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, CHOICES = 5, 8, 6, 7, 2


def config(**others):
    defaults = {
        "activation": "silu",
        "is_gated": True,
        "gemm1_alpha": None,
        "gemm1_clamp_limit": None,
        "swiglu_limit": None,
        "gate_up_interleaved": True,
        "apply_router_weight_on_input": False,
        "layer_id": 3,
    }
    return SimpleNamespace(**{**defaults, **others})


def layer_of(bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = SimpleNamespace(
        w13_weight=torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator),
        w2_weight=torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator),
    )
    if bias:
        layer.w13_weight_bias = torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator)
        layer.w2_weight_bias = torch.randn(EXPERTS, HIDDEN, generator=generator)
    return layer


def routed(tokens=TOKENS, seed=1):
    """Tokens, and the experts that a router chose for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOICES] for _ in range(tokens)])
    weights = torch.rand(tokens, CHOICES, generator=generator)
    return x, weights, ids.int()


def definition(layer, x, weights, ids, act=torch.nn.functional.silu):
    """The weighted sum of the experts of each token, one token after the other."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert >= 0:
                gate, up = (layer.w13_weight[expert] @ x[token]).chunk(2)
                out[token] += weight * (layer.w2_weight[expert] @ (act(gate) * up))
    return out


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_experts_are_a_weighted_sum(activation):
    layer, (x, weights, ids) = layer_of(), routed()
    out = fallbacks.experts(layer, x, (weights, ids, None), config(activation=activation))
    torch.testing.assert_close(out, definition(layer, x, weights, ids, fallbacks.ACTIVATIONS[activation]))


def test_experts_of_other_ranks_add_nothing():
    layer, (x, weights, ids) = layer_of(), routed()
    ids[ids == 2] = -1
    ids[3] = -1
    out = fallbacks.experts(layer, x, (weights, ids, None), config())
    torch.testing.assert_close(out, definition(layer, x, weights, ids))
    assert not out[3].any()


def test_no_tokens():
    layer, (x, weights, ids) = layer_of(), routed()
    out = fallbacks.experts(layer, x[:0], (weights[:0], ids[:0], None), config())
    assert out.shape == (0, HIDDEN)


def test_weights_on_the_input():
    """Llama 4 multiplies an expert's input by its weight, not its output."""
    layer, (x, weights, ids) = layer_of(), routed()
    weights, ids = weights[:, :1], ids[:, :1]
    out = fallbacks.experts(layer, x, (weights, ids, None), config(apply_router_weight_on_input=True))
    torch.testing.assert_close(out, definition(layer, x * weights, torch.ones_like(weights), ids))


def test_experts_of_gpt_oss():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    theirs = GptOssExperts(
        GptOssConfig(
            num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts_per_tok=CHOICES
        )
    )
    layer, (x, weights, ids) = layer_of(bias=True), routed()
    x = 4 * x  # so that some activations reach the limit
    with torch.no_grad():
        theirs.gate_up_proj.copy_(layer.w13_weight.transpose(1, 2))
        theirs.gate_up_proj_bias.copy_(layer.w13_weight_bias)
        theirs.down_proj.copy_(layer.w2_weight.transpose(1, 2))
        theirs.down_proj_bias.copy_(layer.w2_weight_bias)
        expected = theirs(x, ids.long(), weights)
    kind = config(gemm1_alpha=theirs.alpha, gemm1_clamp_limit=theirs.limit)
    torch.testing.assert_close(fallbacks.experts(layer, x, (weights, ids, None), kind), expected, atol=1e-4, rtol=1e-4)


def test_halves_and_columns_in_turn_are_the_same_activation():
    hidden = torch.randn(3, 2 * INTERMEDIATE, generator=torch.Generator().manual_seed(0))
    in_turn = torch.stack(hidden.chunk(2, -1), -1).flatten(1)
    halves = fallbacks.clamped_swiglu(hidden, 1.7, 1.0, interleaved=False)
    assert torch.equal(fallbacks.clamped_swiglu(in_turn, 1.7, 1.0, interleaved=True), halves)


def test_an_unknown_activation_is_refused():
    layer, (x, weights, ids) = layer_of(), routed()
    with pytest.raises(ValueError, match=r"experts of layer 3 need the activation situ .* serve this model on a GPU"):
        fallbacks.experts(layer, x, (weights, ids, None), config(activation="situ"))


def test_logits_are_capped_in_place():
    logits = torch.tensor([[-100.0, 0.0, 1.0, 100.0]])
    expected = 30 * torch.tanh(logits / 30)
    fallbacks.cap_logits(logits, 30.0)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("do_add", [False, True])
def test_the_shared_expert_is_gated(do_add):
    x, shared, output = torch.randn(3, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, HIDDEN)
    expected = torch.sigmoid(x @ weight).unsqueeze(1) * shared + (output if do_add else 0)
    fallbacks.gate_shared_expert(x, weight, shared, output, do_add=do_add)
    torch.testing.assert_close(output, expected)


def test_the_last_slot_of_a_prefix():
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    rows, prefix_lens = torch.tensor([1, 0, 1]), torch.tensor([3, 0, 10])
    slots = fallbacks.last_slots(table, rows, prefix_lens)
    assert slots.tolist() == [12, -1, 19]
    assert slots.dtype == prefix_lens.dtype
