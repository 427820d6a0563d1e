"""Which layers SP mode takes for projections, and which models it refuses after loading."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from model_classes import TINY, Case, build, in_runtime
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.radix_attention import RadixAttention
from sglang_shift.errors import Refused
from sglang_shift.models.families import FAMILIES, check_class
from sglang_shift.weights.base_weights import KINDS, find_projections


def roles(model, family="LlamaForCausalLM"):
    """The roles of the projections, or why there are none."""
    try:
        return [kind.__name__ for _, kind in find_projections(model, FAMILIES[family].linears)]
    except Refused as refusal:
        return str(refusal)


def layer_of(model):
    """The linears of a layer, each with its class and whether it has a bias, and whether heads are normalized."""
    layer = model.model.layers[1]
    linears = {
        name: (type(module), module.bias is not None)
        for name, module in layer.named_modules()
        if isinstance(module, LinearBase)
    }
    attention = [type(module) for module in layer.self_attn.children()]
    return linears, RadixAttention in attention, attention.count(RMSNorm) == 2


def found():
    """The roles in SGLang's own models, whose layers need a runtime to be built."""
    import transformers
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.models.mixtral import MixtralForCausalLM
    from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

    of = {}
    for name in FAMILIES:
        model = build(Case(name).model_config().hf_config)
        check_class(model, name)
        of[name] = roles(model, name)
        of[name, "layer"] = layer_of(model)
        fields = dict.fromkeys(FAMILIES[name].bias_fields, True)
        of[name, "biased layer"] = layer_of(build(Case(name, fields).model_config().hf_config))
    sizes = {**TINY, "num_experts_per_tok": 1}
    of["Mixtral"] = roles(MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=2, **sizes)))
    sparse = transformers.Qwen3MoeConfig(num_experts=2, moe_intermediate_size=32, head_dim=16, **sizes)
    of["Qwen3-MoE"] = roles(Qwen3MoeForCausalLM(sparse))
    for kind, layer in (
        ("replicated", ReplicatedLinear(64, 2, bias=False)),
        ("plain", torch.nn.Linear(64, 2, bias=False)),
    ):
        model = build(Case("LlamaForCausalLM").model_config().hf_config)
        model.model.layers[1].mlp.gate = layer
        of[kind] = roles(model)
    return of


@pytest.fixture(scope="module")
def projections():
    return in_runtime(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_decoder_has_four_a_layer(name, projections):
    layer = ["QkvProjection", "OutputProjection", "GateUpProjection", "DownProjection"]
    assert projections[name] == layer * TINY["num_hidden_layers"]


@pytest.mark.parametrize("name", FAMILIES)
def test_sglangs_class_has_what_the_record_says(name, projections):
    family = FAMILIES[name]
    for kind, biased in (("layer", False), ("biased layer", True)):
        config = SimpleNamespace(**dict.fromkeys(family.bias_fields, biased))
        record = {each.name: (KINDS[each.role][0], each.has_bias(config)) for each in family.linears}
        assert projections[name, kind] == (record, True, family.qk_norm)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Mixtral", "MixtralForCausalLM has a layer that SP mode cannot run: model.layers.0.block_sparse_moe"),
        ("Qwen3-MoE", "Qwen3MoeForCausalLM has a layer that SP mode cannot run: model.layers.0.mlp"),
        ("replicated", "model.layers.1.mlp.gate is a ReplicatedLinear"),
        ("plain", "model.layers.1.mlp.gate is a Linear"),
    ],
)
def test_a_layer_of_another_kind_is_refused(name, words, projections):
    assert words in projections[name]
