"""What SP steps run in place of SGLang's modules: found by the structure of SGLang's own models, or refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from model_classes import TINY, Case, build, in_runtime
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.radix_attention import RadixAttention
from sglang_shift import seams
from sglang_shift.errors import Refused, ShiftError
from sglang_shift.layers import structure
from sglang_shift.layers.embedding import let_rows_replace
from sglang_shift.layers.sp_model import SpModel
from sglang_shift.layers.streams import run_on_one_stream
from sglang_shift.models.families import FAMILIES, Role, check_class
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.base_weights import loading_for

HIDDEN, HEAD = TINY["hidden_size"], TINY["hidden_size"] // TINY["num_attention_heads"]
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, **EXPERTS,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0,
    },
}  # fmt: skip
GPT = {"n_embd": HIDDEN, "n_head": 4, "n_layer": 2, "n_positions": 256, "vocab_size": 512}
OTHERS = {
    "Mixtral": ("mixtral:MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "Qwen3-MoE": ("qwen3_moe:Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 2, "head_dim": 16, **EXPERTS}),
    "DeepSeek V2": (
        "deepseek_v2:DeepseekV2ForCausalLM", "DeepseekV2Config",
        {**MLA, "q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax"},
    ),
    "DeepSeek V3": (
        "deepseek_v2:DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**MLA, "q_lora_rank": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "Gemma 3": ("gemma3_causal:Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 16, "sliding_window": 64}),
    "GPT-BigCode": ("gpt_bigcode:GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
}  # fmt: skip


class TwinGroup:
    """A group of two ranks of which the other one has the same shards as this rank."""

    world_size, rank_in_group, device_group = 2, 0, None

    def all_gather_into_tensor(self, output, input):
        output.copy_(torch.cat([input, input]))


GROUP = TwinGroup()
TOPOLOGY = Topology(RankLayout(2, 2), 0, GROUP, None, CollectiveExchange(GROUP))  # type: ignore[arg-type]


def other_model(name):
    """One of SGLang's models, with room for its base weights."""
    import importlib

    import transformers

    place, config, fields = OTHERS[name]
    module, _, class_name = place.partition(":")
    sizes = {} if "n_embd" in fields else TINY
    loaded = getattr(importlib.import_module(f"sglang.srt.models.{module}"), class_name)
    return loaded(config=getattr(transformers, config)(**{**sizes, **fields}))


def llama():
    return build(Case("LlamaForCausalLM").model_config().hf_config)


def replaced(model, **options):
    """What SP steps run, by the name of the module, or why they cannot run the model."""
    try:
        sp_model = SpModel(model, TOPOLOGY, **options)
    except Refused as refusal:
        return str(refusal)
    with sp_model.forwards.installed():
        found = {name: type(module.forward).__name__ for name, module in model.named_modules() if _is_ours(module)}
        plans = {
            f"{name}.{key}": type(value.plan.qkv_latent_func).__name__
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if hasattr(getattr(value, "plan", None), "qkv_latent_func") and _is_object(value.plan.qkv_latent_func)
        }
    assert len(found) + len(plans) == len(sp_model.forwards), "every method was found again"
    assert not any("forward" in vars(module) for module in model.modules())
    return {**found, **plans}


def _is_ours(module):
    return "forward" in vars(module)


def _is_object(function):
    return type(function).__module__.startswith("sglang_shift")


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


def changed_llamas():
    """Llama with one module that it does not have, and what SP steps make of it."""
    from sglang.srt.layers.linear import ReplicatedLinear

    def changed(change):
        model = llama()
        change(model.model.layers[1], model)
        return replaced(model)

    def bias_of_attention(layer, model):
        layer.self_attn.qkv_proj = QKVParallelLinear(HIDDEN, HEAD, 4, 2, bias=True, skip_bias_add=True)

    def bias_of_mlp(layer, model):
        layer.mlp.gate_up_proj = MergedColumnParallelLinear(HIDDEN, [96, 96], bias=True, skip_bias_add=True)

    def output_elsewhere(layer, model):
        """As BERT has it."""
        layer.output, layer.self_attn.o_proj = layer.self_attn.o_proj, None

    def attention_elsewhere(layer, model):
        layer.self_attn.attn = torch.nn.ModuleList([layer.self_attn.attn])

    def no_attention(layer, model):
        model.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    return {
        "gathers": changed(lambda layer, _: setattr(layer.self_attn.qkv_proj, "gather_output", True)),
        "splits": changed(lambda layer, _: setattr(layer.self_attn.o_proj, "input_is_parallel", False)),
        "bias of attention": changed(bias_of_attention),
        "bias of MLP": changed(bias_of_mlp),
        "row bias": changed(lambda layer, _: setattr(layer.mlp.down_proj, "skip_bias_add", True)),
        "gathers elsewhere": changed(lambda layer, _: setattr(layer.mlp.gate_up_proj, "gather_output", True)),
        "recurrent": changed(mamba),
        "output elsewhere": changed(output_elsewhere),
        "attention elsewhere": changed(attention_elsewhere),
        "no attention": changed(no_attention),
        "replicated": changed(lambda layer, _: setattr(layer.mlp, "gate", ReplicatedLinear(64, 2, bias=False))),
        "plain": changed(lambda layer, _: setattr(layer.mlp, "gate", torch.nn.Linear(64, 2, bias=False))),
    }


def mamba(layer, _):
    """Put a recurrent layer into a layer, without its weights."""
    from sglang.srt.layers.attention.mamba.mamba import MambaMixer2

    layer.mixer = MambaMixer2.__new__(MambaMixer2)
    torch.nn.Module.__init__(layer.mixer)


def tower():
    """A vision tower beside the layers: what is replaced, and what became of the room for its base weights."""
    model = llama()
    block = torch.nn.Module()
    block.fc1, block.fc2 = ColumnParallelLinear(HIDDEN, 32), RowParallelLinear(32, HIDDEN)
    block.positions = torch.nn.Embedding(4, HIDDEN)
    model.visual = torch.nn.ModuleList([block])
    linears = [block.fc1, block.fc2]
    values, reserved = [], []
    for linear in linears:
        linear.weight.data.normal_()
        values.append(linear.weight.data.clone())
        reserved.append(linear.weight.untyped_storage().nbytes() // linear.weight.nbytes)
    found = replaced(model)
    return {
        "replaced": [name for name in found if name.startswith("visual")],
        "reserved": reserved,
        "sizes": [linear.weight.untyped_storage().nbytes() // linear.weight.nbytes for linear in linears],
        "kept": [torch.equal(linear.weight.data, value) for linear, value in zip(linears, values, strict=True)],
        "room": [hasattr(linear.weight, "shift_base") for linear in linears],
    }


def latent_weights():
    """Of an MLA layer: which linears still have room for base weights that no SP step reads."""
    model = other_model("DeepSeek V3")
    sp_model = SpModel(model, TOPOLOGY)
    attention = model.model.layers[1].self_attn
    sizes = {}
    for name in ("q_b_proj", "kv_b_proj", "o_proj"):
        weight = getattr(attention, name).weight
        sizes[name] = weight.untyped_storage().nbytes() // weight.nbytes
    return sizes, sp_model.exchange_columns


def table_of(model, method=None):
    """The table whose rows a request may replace, after we let it, or None if the model takes no rows."""
    if method is not None:
        model.get_input_embeddings = method
    if not let_rows_replace(model):
        return None
    table = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is table)


def table_of_adapters():
    """Whether rows are replaced in the wrapper that SGLang has put around the table, for adapters."""
    model = other_model("Mixtral")
    let_rows_replace(model)
    wrapper = model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)
    return model.get_input_embeddings() is wrapper


def deferred_sums():
    """What SP steps see of experts that can leave their sums to a later kernel, and what is there afterwards."""
    model = other_model("DeepSeek V3")
    experts = model.model.layers[1].mlp.experts
    experts.supports_deferred_finalize = True
    sp_model = SpModel(model, TOPOLOGY)
    with sp_model.forwards.installed():
        seen = experts.supports_deferred_finalize
        try:
            experts.forward_deferred_finalize(torch.zeros(1, HIDDEN), None)
        except ShiftError as error:
            message = str(error)
    return seen, message, experts.supports_deferred_finalize


def streams(base_tp_group):
    """The second streams of a layer's attention and of its experts in SP steps, and afterwards."""
    model = other_model("DeepSeek V3")
    modules = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for module in modules:
        module.alt_stream = "second"
    topology = replace(TOPOLOGY, layout=RankLayout(4 if base_tp_group else 2, 2), base_tp_group=base_tp_group)
    with SpModel(model, topology).forwards.installed():
        seen = [module.alt_stream for module in modules]
    return seen, [module.alt_stream for module in modules]


def stream_of_llama_4():
    """Whether the experts of Llama 4 run on one stream, as on a CPU, where the method for GPUs is called."""
    from sglang.srt.models.llama4 import Llama4MoE
    from transformers import Llama4TextConfig

    fields = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    block, forwards = Llama4MoE(Llama4TextConfig(**fields), 0), Forwards()
    run_on_one_stream(block, forwards)
    with forwards.installed():
        return block._forward_core_shared_routed_overlap == block._forward_core_normal


def columns():
    """The columns of the exchanges of Llama, and how much they send in a step of 5 tokens."""
    sp_model = SpModel(llama(), TOPOLOGY)
    volume = sp_model.exchange_volume(TOPOLOGY.exchange, torch.float32)
    return sp_model.exchange_columns, (volume.sp_size, volume.calls, volume.bytes_sent(5)), len(sp_model.projections)


def found():
    """All of this in SGLang's own models, whose layers need a runtime to be built."""
    seams.install()
    structure.get_group_rank_size = lambda group: (0, 2)  # this process takes the part of one of two ranks
    of = {}
    with loading_for(TOPOLOGY):
        for name in FAMILIES:
            model = build(Case(name).model_config().hf_config)
            check_class(model, name)
            of[name] = replaced(model)
            of[name, "layer"] = layer_of(model)
            fields = dict.fromkeys(FAMILIES[name].bias_fields, True)
            of[name, "biased layer"] = layer_of(build(Case(name, fields).model_config().hf_config))
        for name in OTHERS:
            of[name] = replaced(other_model(name))
            of[name, "table"] = table_of(other_model(name))
        of["table of another method"] = table_of(llama(), lambda ids: ids)
        of["pools"], of["pools itself"] = replaced(llama(), pools=True), replaced(llama().model, pools=True)
        of["experts of a dense model"] = replaced(llama(), replicate_experts=True)
        of |= changed_llamas()
        of["tower"], of["latent weights"], of["columns"] = tower(), latent_weights(), columns()
        of["table of adapters"], of["deferred sums"] = table_of_adapters(), deferred_sums()
        of["streams"], of["streams of base TP"] = streams(None), streams(GROUP)
        of["stream of Llama 4"] = stream_of_llama_4()
    return of


@pytest.fixture(scope="module")
def projections():
    return in_runtime(found)


def layer(of, number, prefix="model.layers"):
    """What is replaced in one layer."""
    start = f"{prefix}.{number}."
    return {name.removeprefix(start): kind for name, kind in of.items() if name.startswith(start)}


DENSE = {
    "self_attn.qkv_proj": "QkvProjection",
    "self_attn.o_proj": "OutputProjection",
    "mlp.gate_up_proj": "ColumnProjection",
    "mlp.down_proj": "RowProjection",
}
AROUND = {"logits_processor": "ExitToLogits"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_decoder_has_four_a_layer(name, projections):
    of = projections[name]
    assert [layer(of, i) for i in range(TINY["num_hidden_layers"])] == [DENSE] * TINY["num_hidden_layers"]
    around = {key: kind for key, kind in of.items() if ".layers." not in key}
    # With one TP rank, as here, the table is whole.
    assert around == {"model.embed_tokens": "WholeLookup", **AROUND}


def test_a_model_that_pools_leaves_after_its_layers(projections):
    around = {key: kind for key, kind in projections["pools"].items() if ".layers." not in key}
    assert around == {"model": "ExitAfterLayers", "model.embed_tokens": "WholeLookup"}
    assert "pools without a module that returns its hidden states" in projections["pools itself"]


KINDS = {
    Role.QKV: QKVParallelLinear,
    Role.OUTPUT: RowParallelLinear,
    Role.GATE_UP: MergedColumnParallelLinear,
    Role.DOWN: RowParallelLinear,
}
"""For each role in the records, the class of SGLang's linear."""


@pytest.mark.parametrize("name", FAMILIES)
def test_sglangs_class_has_what_the_record_says(name, projections):
    family = FAMILIES[name]
    for kind, biased in (("layer", False), ("biased layer", True)):
        config = SimpleNamespace(**dict.fromkeys(family.bias_fields, biased))
        record = {each.name: (KINDS[each.role], each.has_bias(config)) for each in family.linears}
        assert projections[name, kind] == (record, True, family.qk_norm)


SPARSE = {"self_attn.qkv_proj": "QkvProjection", "self_attn.o_proj": "OutputProjection"}
LATENT_MLP = {"mlp.gate_up_proj": "ColumnProjection", "mlp.down_proj": "RowProjection"}
LATENT_EXPERTS = {
    "mlp.topk": "Router",
    "mlp.experts": "Experts",
    "mlp.shared_experts.gate_up_proj": "ColumnProjection",
    "mlp.shared_experts.down_proj": "RowProjection",
}


@pytest.mark.parametrize(
    ("name", "number", "kinds"),
    [
        ("Mixtral", 1, {**SPARSE, "block_sparse_moe.topk": "Router", "block_sparse_moe.experts": "Experts"}),
        ("Qwen3-MoE", 1, {**SPARSE, "mlp.topk": "Router", "mlp.experts": "Experts"}),
        ("Gemma 3", 1, DENSE),
    ],
)
def test_other_decoders(name, number, kinds, projections):
    assert layer(projections[name], number) == kinds
    assert projections[name]["model.embed_tokens"] == "WholeLookup"
    assert projections[name]["logits_processor"] == "ExitToLogits"


@pytest.mark.parametrize("name", OTHERS)
def test_the_table_whose_rows_a_request_may_replace(name, projections):
    """Mixtral's class has no method that returns it, and the forward of GPT-BigCode takes no rows."""
    assert projections[name, "table"] == (None if name == "GPT-BigCode" else "model.embed_tokens")


def test_a_method_that_takes_ids_does_not_return_the_table(projections):
    assert projections["table of another method"] == "model.embed_tokens"


def test_adapters_of_the_table_count_in_replaced_rows(projections):
    """SGLang wraps the table after we have found it. A step with a request that replaces rows lost the adapters."""
    assert projections["table of adapters"]


def test_experts_sum_at_once_in_sp_steps(projections):
    """In CUDA graphs on Blackwell, DeepSeek's block called another method of the experts than ``forward``."""
    seen, message, afterwards = projections["deferred sums"]
    assert not seen and afterwards
    assert "later kernel, which SP steps do not have; serve it without --sp-size" in message


def test_experts_use_one_stream_if_sp_steps_sum_over_a_base_tp_group(projections):
    """Two sums of one group at the same time would share its buffers."""
    both = ["second", "second"]
    assert projections["streams"] == (both, both)
    assert projections["streams of base TP"] == (["second", None], both)
    assert projections["stream of Llama 4"]


def test_latents_of_all_tokens_without_lora_on_queries(projections):
    """Queries are exchanged by heads, and latents are gathered."""
    attention = {
        "self_attn.q_proj": "QkvProjection",
        "self_attn.kv_a_proj_with_mqa": "GatheredLatents",
        "self_attn.kv_b_proj": "HeadsProjection",
        "self_attn.o_proj": "OutputProjection",
    }
    of = projections["DeepSeek V2"]
    assert layer(of, 0) == {**attention, **LATENT_MLP}
    assert layer(of, 1) == {**attention, **LATENT_EXPERTS}


def test_latents_of_all_tokens_with_lora_on_queries(projections):
    """Queries come from the latents, too: their linear computes heads as in TP."""
    attention = {
        "attn_boundary": "GatheredLatents",  # in the boundary's plan
        "self_attn.q_b_proj": "HeadsProjection",
        "self_attn.kv_b_proj": "HeadsProjection",
        "self_attn.o_proj": "OutputProjection",
    }
    of = projections["DeepSeek V3"]
    assert layer(of, 0) == {**attention, **LATENT_MLP}
    assert layer(of, 1) == {**attention, **LATENT_EXPERTS}


def test_linears_that_no_sp_step_reads_keep_no_room(projections):
    sizes, exchange_columns = projections["latent weights"]
    assert sizes == {"q_b_proj": 1, "kv_b_proj": 1, "o_proj": 2}
    assert exchange_columns == [4 * 16] * TINY["num_hidden_layers"], "only O is exchanged"


def test_a_table_of_positions_is_an_embedding(projections):
    of = projections["GPT-BigCode"]
    assert {key: kind for key, kind in of.items() if ".h." not in key} == {
        "transformer.wte": "WholeLookup",
        "transformer.wpe": "WholeLookup",
        **AROUND,
    }
    assert layer(of, 1, "transformer.h") == {
        "attn.c_attn": "QkvProjection",
        "attn.c_proj": "OutputProjection",
        "mlp.c_fc": "ColumnProjection",
        "mlp.c_proj": "RowProjection",
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gathers", "layer that SP mode cannot run: model.layers.1.self_attn.qkv_proj gathers its output or splits"),
        ("splits", "model.layers.1.self_attn.o_proj gathers its output or splits its input"),
        ("bias of attention", "model.layers.1.self_attn.qkv_proj returns its bias instead of adding it"),
        ("bias of MLP", "model.layers.1.mlp.gate_up_proj returns its bias instead of adding it"),
        ("recurrent", "LlamaForCausalLM has a layer that SP mode cannot run: model.layers.1.mixer is recurrent"),
        ("experts of a dense model", "replicated has no meaning for LlamaForCausalLM, which has no experts"),
        ("output elsewhere", "model.layers.1.self_attn lacks a linear of its own before or after its attention"),
        ("attention elsewhere", "layers.1.self_attn.attn lacks a linear of its own before or after its attention"),
        ("no attention", "LlamaForCausalLM has no list of layers with SGLang's attention"),
    ],
)
def test_a_layer_that_no_sp_step_can_run_is_refused(name, words, projections):
    assert words in projections[name]


@pytest.mark.parametrize("name", ["row bias", "gathers elsewhere", "replicated", "plain"])
def test_other_linears_need_nothing_else(name, projections):
    """A whole linear computes each row alone. Outside of attention, a linear may gather or split columns."""
    assert layer(projections[name], 1) == DENSE


def test_a_vision_tower_is_left_alone_and_its_room_is_released(projections):
    assert projections["tower"] == {
        "replaced": [],
        "reserved": [2, 2],
        "sizes": [1, 1],
        "kept": [True, True],
        "room": [False, False],
    }


def test_the_columns_of_an_exchange(projections):
    """QKV of 4 + 2 * 2 heads and O of 4 heads, in each layer; 2 ranks exchange 3 rows for 5 tokens."""
    columns, volume, count = projections["columns"]
    layers = TINY["num_hidden_layers"]
    assert columns == [8 * HEAD, 4 * HEAD] * layers
    assert volume == (2, 2 * layers, layers * 3 * 12 * HEAD * 4)
    assert count == 4 * layers
