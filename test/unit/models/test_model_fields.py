"""Fields of ``config.json``: what is served answers as transformers does, what would not is refused.

Tiny random models in float32, SGLang's class beside transformers'; which fields either reads, by their sources; and
the configurations of published checkpoints.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from model_classes import Case, difference, in_runtime
from sglang_shift.args.model_check import check_model
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused
from sglang_shift.launch_server import resolve
from sglang_shift.models.families import FAMILIES, PACKAGE, check_class
from sglang_shift.models.fields import (
    COMMON_FIELDS,
    FOREIGN,
    HARMLESS,
    ROPE,
    RULES,
    WINDOW,
    check_fields,
    supported_fields,
)
from sglang_shift.models.rules import Checkpoint

LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, *_ = FAMILIES
SHIFT = ShiftConfig(2, 2, True, "tokens")
CLOSE, APART = 1e-4, 0.05  # nats


def rope(kind="default", **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def yarn(**parameters):
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 64, **parameters})


def longrope(length=256, **parameters):
    short, long = [1 + i / 10 for i in range(8)], [2 + i / 3 for i in range(8)]
    scaled = rope("longrope", short_factor=short, long_factor=long, **parameters)
    return {**scaled, "max_position_embeddings": 512, "original_max_position_embeddings": length}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
HALF = {"partial_rotary_factor": 0.5}
SLIDING = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}

SERVED = {
    **{f"{name}, plain": Case(name, {} if name != MISTRAL else {"sliding_window": None}) for name in FAMILIES},
    **{f"{name}, tied": Case(name, {"tie_word_embeddings": True, "sliding_window": None}) for name in FAMILIES},
    **{f"{name}, wide heads": Case(name, {"head_dim": 24, "sliding_window": None}) for name in FAMILIES},
    "Llama with biases": Case(LLAMA, {"attention_bias": True}),
    "Qwen3 with biases": Case(QWEN3, {"attention_bias": True}),
    "Qwen2 that says what it has": Case(QWEN2, {"attention_bias": True}),
    "epsilon": Case(LLAMA, {"rms_norm_eps": 0.1}),
    "pretraining_tp": Case(LLAMA, {"pretraining_tp": 2}),
    "theta": Case(LLAMA, {"rope_theta": 500.0}),
    "window of the prompt": Case(MISTRAL, {"sliding_window": 200}, context=200),
    "window of the prompt, Phi": Case(PHI3, {"sliding_window": 200}, context=200),
    "window of the prompt, Qwen": Case(QWEN3, {**SLIDING, "sliding_window": 200}, context=200),
    "window that is not used": Case(QWEN2, {**SLIDING, "use_sliding_window": False}),
    "window of no layer": Case(QWEN2, {**SLIDING, "max_window_layers": 2}),
    "partial rotary": Case(PHI3, HALF),
    "linear": Case(LLAMA, {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "linear, Qwen": Case(QWEN2, {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama3": Case(LLAMA, LLAMA3),
    "llama3, Qwen": Case(QWEN3, LLAMA3),
    "yarn": Case(LLAMA, yarn()),
    "yarn, Qwen": Case(QWEN2, yarn()),
    "yarn, its parameters": Case(MISTRAL, {**yarn(beta_fast=16, beta_slow=2, truncate=False), "sliding_window": None}),
    "yarn, mscales": Case(QWEN3, yarn(mscale=1.0, mscale_all_dim=0.5)),
    "yarn, one mscale": Case(LLAMA, yarn(mscale=0.7)),
    "yarn, the usual attention": Case(LLAMA, yarn(attention_factor=0.1 * math.log(4) + 1)),
    "yarn, length outside": Case(LLAMA, {**yarn(), "original_max_position_embeddings": 128}),
    "longrope": Case(PHI3, longrope(), context=256),
    "longrope, partial": Case(PHI3, {**longrope(), **HALF, "head_dim": 32, "hidden_size": 128}, context=256),
    "longrope, Llama": Case(LLAMA, longrope(), context=256),
}

# (what is refused, with which words, and how the words say it can be served)
REFUSED = {
    "mlp_bias": (Case(LLAMA, {"mlp_bias": True}), "mlp_bias True, with which SGLang's LlamaForCausalLM", None),
    "activation": (Case(QWEN2, {"hidden_act": "gelu"}), "hidden_act 'gelu'", None),
    "partial rotary": (Case(LLAMA, HALF), "partial_rotary_factor 0.5", None),
    "bias": (Case(LLAMA, {"bias": True}), "bias True", {"override": {"bias": False}}),
    "biases of Mistral": (
        Case(MISTRAL, {"attention_bias": True, "sliding_window": None}),
        "attention_bias True",
        {"override": {"attention_bias": False}},
    ),
    "biases of Phi": (Case(PHI3, {"attention_bias": True}), "attention_bias True", None),
    "interleaved": (Case(LLAMA, {"rope_is_neox_style": False}), "rope_is_neox_style False", None),
    "not causal": (Case(QWEN3, {"is_causal": False}), "is_causal False", None),
    "soft cap": (Case(LLAMA, {"final_logit_softcapping": 5.0}), "final_logit_softcapping 5.0", None),
    "Granite's": (
        Case(LLAMA, {"attention_multiplier": 0.9, "rope_theta": 10000.0}, config_class="GraniteConfig"),
        "attention_multiplier 0.9",
        None,
    ),
    "Granite's residual": (
        Case(LLAMA, {"residual_multiplier": 0.5, "attention_multiplier": 0.25}, config_class="GraniteConfig"),
        "residual_multiplier 0.5",
        None,
    ),
    "Granite's logits": (
        Case(LLAMA, {"logits_scaling": 8.0, "attention_multiplier": 0.25}, config_class="GraniteConfig"),
        "logits_scaling 8.0",
        None,
    ),
    "window": (Case(MISTRAL, {"sliding_window": 32}), "sliding_window 32, .* --context-length 32 or less",
               {"context": 32, "tokens": 32}),
    "window by one": (Case(MISTRAL, {"sliding_window": 199}, context=200), "--context-length 199",
                      {"context": 199, "tokens": 199}),
    "window of Phi": (Case(PHI3, {"sliding_window": 47}), "sliding_window 47", {"context": 47, "tokens": 47}),
    "window of Qwen2": (Case(QWEN2, SLIDING), "sliding_window 32", {"context": 32, "tokens": 32}),
    "window of Qwen3": (Case(QWEN3, SLIDING), "sliding_window 32", {"context": 32, "tokens": 32}),
    "partial rotary inside": (
        Case(PHI3, rope(**HALF)), "partial_rotary_factor 0.5 among .* as well", {"override": HALF}
    ),
    "whole linear": (
        Case(LLAMA, rope("linear", factor=3)), "a number with a point", {"override": {"rope_scaling": {"factor": 3.0}}}
    ),
    "dynamic": (
        Case(LLAMA, rope("dynamic", factor=2.0)),
        "rope type 'dynamic'.*--context-length 256",
        {"override": {"rope_scaling": {"rope_type": "default", "type": "default"}}, "context": 256},
    ),
    "yarn, attention": (Case(LLAMA, yarn(attention_factor=1.0)), "takes 1.13863", None),
    "yarn, attn": (
        Case(LLAMA, yarn(attn_factor=1.3)), "attn_factor 1.3", {"override": {"rope_scaling": {"attn_factor": 1}}}
    ),
    "yarn, attn, null": (
        Case(QWEN3, yarn(attn_factor=None)), "attn_factor None", {"override": {"rope_scaling": {"attn_factor": 1}}}
    ),
    "yarn, extrapolation": (
        Case(LLAMA, yarn(extrapolation_factor=0.5)),
        "extrapolation_factor 0.5",
        {"override": {"rope_scaling": {"extrapolation_factor": 1}}},
    ),
    "yarn, mscale": (Case(LLAMA, yarn(mscale=0.7, mscale_all_dim=0)), "mscale_all_dim 0", None),
    "yarn, null": (Case(LLAMA, yarn(beta_fast=None)), "beta_fast", None),
    "yarn, length outside": (
        Case(QWEN2, {**yarn(), "original_max_position_embeddings": 200}),
        "original_max_position_embeddings 200, and 64",
        None,
    ),
    "longrope beyond": (
        Case(PHI3, longrope(199), context=200), "depend on other requests; give --context-length 199",
        {"context": 199, "tokens": 199},
    ),
    "longrope, attention": (Case(PHI3, longrope(attention_factor=1.3), context=256), "attention_factor 1.3", None),
    "longrope, factor": (Case(PHI3, longrope(factor=8.0), context=256), "here 2; make them agree", None),
    "longrope, short": (Case(PHI3, longrope(short_mscale=1.3), context=256), "short_mscale 1.3", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def differences():
    """Of each case's answers from transformers', in nats."""
    ways = {name: replace(case, **way) for name, (case, _, way) in REFUSED.items() if way}
    groups = {"served": SERVED, "refused": {name: case for name, (case, _, _) in REFUSED.items()}, "way out": ways}
    return in_runtime(
        lambda: {(group, name): difference(case) for group, cases in groups.items() for name, case in cases.items()}
    )


def check(case):
    check_model(case.model_config(), SHIFT)


@pytest.mark.parametrize("name", SERVED)
def test_what_is_served_answers_as_transformers_does(name, differences):
    check(SERVED[name])
    assert differences["served", name] < CLOSE


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_answer_otherwise_is_refused(name, differences):
    case, words, way_out = REFUSED[name]
    off = differences["refused", name]
    assert isinstance(off, str) or not off < APART, "the control: without a difference it need not be refused"
    with pytest.raises(Refused, match=words) as refusal:
        check(case)
    assert "\n" not in str(refusal.value)
    if way_out:
        check(replace(case, **way_out))


LAYERS = {"full_attention": rope()["rope_parameters"]}


NEITHER = (
        # Neither computes these.
        (Case(QWEN3, {"layer_types": ["full_attention"] * 2, "rope_parameters": LAYERS}), "by type of layer"),
        (Case(LLAMA, {"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}), "mrope_section"),
        (Case(LLAMA, {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}), "rope type 'proportional'"),
        (Case(QWEN2, {"layer_types": ["full_attention", "chunked_attention"]}), "layers of type chunked_attention"),
        (Case(LLAMA, {"no_rope_layers": [0, 1]}), "no_rope_layers"),
        (Case(LLAMA, {"attn_logit_softcapping": 30.0}), "attn_logit_softcapping 30.0"),
        (Case(QWEN2, {"attention_bias": False}), "attention_bias False"),
    (Case(LLAMA, rope(**HALF)), r"partial_rotary_factor 0\.5 among .*; serve another"),
        (Case(LLAMA, {"model_type": "mistral"}), "model_type 'mistral'"),
        # The user asked for yarn with the old key, over the configuration's own rope_type.
        (Case(QWEN2, override={"rope_scaling": {"type": "yarn", "factor": 4.0}}), "'default' and type 'yarn'"),
        (Case(QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}), "sliding_attention, and no sliding"),
    )  # fmt: skip


@pytest.mark.parametrize(("case", "words"), NEITHER)
def test_what_neither_computes_is_refused(case, words):
    with pytest.raises(Refused, match=words):
        check(case)


def test_a_layer_with_a_configuration_of_its_own_is_refused():
    config = transformers.LlamaConfig(architectures=[LLAMA], per_layer_config={1: {"rms_norm_eps": 0.5}})
    with pytest.raises(Refused, match="per_layer_config"):
        check_fields(config, 100)


WAYS_OUT = [name for name, (_, _, way_out) in REFUSED.items() if way_out]


@pytest.mark.parametrize("name", WAYS_OUT)
def test_the_way_out_answers_as_transformers_does(name, differences):
    assert differences["way out", name] < CLOSE


JUDGED = COMMON_FIELDS | HARMLESS | ROPE | WINDOW | FOREIGN.keys()
# What SGLang's sources read besides: drafts of other models, a dtype, its own context, and a class's name.
ELSEWHERE = {"target_hidden_size", "model_type", "__class__", "rope_theta", "rope_scaling"}


def read_fields(source):
    named = re.findall(r"\bconfig\.(\w+)", source)
    return set(named) | set(re.findall(r"(?:get|has)attr\(\s*(?:self\.)?config,\s*\"(\w+)\"", source))


def own_fields(name):
    return {field.name for field in fields(transformers.CONFIG_MAPPING[FAMILIES[name].model_type])}


def test_every_field_that_sglang_reads_has_been_judged():
    from sglang.srt.models import mistral

    assert not vars(mistral.MistralForCausalLM).keys() - {"__module__", "__doc__", "__annotations__"}
    modules = {importlib.import_module(PACKAGE + family.module) for family in FAMILIES.values()} - {mistral}
    read = set().union(*(read_fields(inspect.getsource(module)) for module in modules))
    assert {"rms_norm_eps", "rope_is_neox_style", "dual_chunk_attention_config"} <= read
    assert read - ELSEWHERE - {"hidden_act"} <= JUDGED


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_that_transformers_reads_has_been_judged(name):
    model_type = FAMILIES[name].model_type
    modules = (f"models.{model_type}.modeling_{model_type}", "masking_utils", "modeling_rope_utils")
    read = set().union(*(read_fields(inspect.getsource(importlib.import_module("transformers." + m))) for m in modules))
    assert {"rms_norm_eps", "is_causal", "sliding_window"} <= read
    methods = {"get_text_config", "standardize_rope_params", "validate_rope", "per_layer_config", "default_theta"}
    assert read - methods - {"_attn_implementation", "json"} <= JUDGED | own_fields(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_transformers_configuration_has_been_judged(name):
    """Those that are refused if they differ from the default, and no other; a new one is refused as well."""
    refused = own_fields(name) - supported_fields(FAMILIES[name]) - HARMLESS - ROPE - WINDOW
    assert refused == {"is_encoder_decoder", "hidden_act"} | ({"mlp_bias"} if name == LLAMA else set())


def published(architecture, hidden, heads, kv_heads, positions, **others):
    """A published checkpoint's ``config.json``, in what is read of it, with the usual other fields."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": 1024, "num_hidden_layers": 40, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": positions, "vocab_size": 32000,
    }  # fmt: skip
    usual = {
        "_name_or_path": "somewhere", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0", "use_cache": True, "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    if architecture == PHI3:
        usual |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False,
                  "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}  # fmt: skip
    return Case(architecture, {**usual, **sizes, **others})


FACTORS = {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48}
WIDE_FACTORS = {"long_factor": [1.5] * 64, "short_factor": [1.1] * 64}
LLAMA_31 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}  # fmt: skip
QWEN = {"use_sliding_window": False, "max_window_layers": 28}

# (the checkpoint, the longest context that is served: its own, or what a refusal names)
PUBLISHED = {
    "Llama 2": (published(LLAMA, 4096, 32, 32, 4096, rope_scaling=None, pretraining_tp=1), None),
    "Llama 3": (published(LLAMA, 4096, 32, 8, 8192, rope_theta=500000.0, attention_bias=False, mlp_bias=False), None),
    "Llama 3.1": (published(LLAMA, 4096, 32, 8, 131072, rope_theta=500000.0, rope_scaling=LLAMA_31), None),
    "Llama 3.2": (published(LLAMA, 2048, 32, 8, 131072, head_dim=64, tie_word_embeddings=True,
                            rope_scaling={**LLAMA_31, "factor": 32.0}), None),
    "CodeLlama": (published(LLAMA, 4096, 32, 32, 16384, rope_theta=1000000), None),
    "SmolLM2": (published(LLAMA, 2048, 32, 32, 8192, rope_interleaved=False, is_llama_config=True), None),
    "DeepSeek Coder": (published(LLAMA, 4096, 32, 32, 16384, rope_scaling={"factor": 4.0, "type": "linear"}), None),
    "Vicuna 16k": (published(LLAMA, 4096, 32, 32, 4096, max_sequence_length=16384,
                             rope_scaling={"factor": 4.0, "type": "linear"}), 16384),
    "Mistral 0.1": (published(MISTRAL, 4096, 32, 8, 32768, sliding_window=4096), 4096),
    "Mistral 0.2": (published(MISTRAL, 4096, 32, 8, 32768, sliding_window=None, rope_theta=1e6), None),
    "Mistral 0.3": (published(MISTRAL, 4096, 32, 8, 32768, sliding_window=None, rope_theta=1e6), None),
    "Nemo": (published(MISTRAL, 5120, 32, 8, 131072, head_dim=128, sliding_window=None), None),
    "Phi-3 mini 4k": (published(PHI3, 3072, 32, 32, 4096, sliding_window=2047, rope_scaling=None,
                                original_max_position_embeddings=4096), 2047),
    "Phi-3 mini 128k": (published(PHI3, 3072, 32, 32, 131072, sliding_window=262144,
                                  rope_scaling={"type": "longrope", **FACTORS},
                                  original_max_position_embeddings=4096), 4096),
    "Phi-3 medium 4k": (published(PHI3, 5120, 40, 10, 4096, sliding_window=2047, rope_scaling=None,
                                  original_max_position_embeddings=4096), 2047),
    "Phi-3 medium 128k": (published(PHI3, 5120, 40, 10, 131072, sliding_window=131072,
                                    rope_scaling={"type": "longrope", **WIDE_FACTORS},
                                    original_max_position_embeddings=4096), 4096),
    "Phi-4": (published(PHI3, 5120, 40, 10, 16384, sliding_window=None, rope_theta=250000,
                        original_max_position_embeddings=16384), None),
    "Phi-4 mini": (published(PHI3, 3072, 24, 8, 131072, sliding_window=262144, partial_rotary_factor=0.75,
                             rope_scaling={"type": "longrope", **FACTORS}, tie_word_embeddings=True,
                             original_max_position_embeddings=4096), 4096),
    "Qwen2": (published(QWEN2, 3584, 28, 4, 32768, sliding_window=131072, rope_theta=1e6, **QWEN), None),
    "Qwen2.5": (published(QWEN2, 3584, 28, 4, 32768, sliding_window=131072, rope_theta=1e6, **QWEN), None),
    "Qwen2.5 with yarn": (published(QWEN2, 3584, 28, 4, 32768, sliding_window=131072, **QWEN, rope_scaling={
        "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}), None),
    "Qwen3": (published(QWEN3, 4096, 32, 8, 40960, head_dim=128, attention_bias=False, sliding_window=None,
                        rope_scaling=None, rope_theta=1000000, **QWEN), None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name):
    case, longest = PUBLISHED[name]
    if longest:
        with pytest.raises(Refused, match=f"give --context-length {longest} or less"):
            check(case)
        case = replace(case, context=longest)
    check(case)


def test_granites_code_models_are_refused():
    with pytest.raises(Refused, match="mlp_bias True"):
        check(published(LLAMA, 2560, 32, 32, 2048, attention_bias=True, mlp_bias=True))


def test_ministral_is_served_up_to_its_window():
    """Transformers takes a Mistral with layer_types for another model, with this window in some layers."""
    layers = ["full_attention", *["sliding_attention"] * 3] * 10
    ministral = published(MISTRAL, 4096, 32, 8, 131072, head_dim=128, sliding_window=32768, layer_types=layers)
    with pytest.raises(Refused, match=r"model_type 'ministral'.* give .*'{.model_type.: .mistral.}'"):
        check(ministral)
    overridden = replace(ministral, override={"model_type": "mistral"})
    with pytest.raises(Refused, match="give --context-length 32768 or less"):
        check(overridden)
    check(replace(overridden, context=32768))


def test_linear_scaling_ends_where_sglang_extends_its_table():
    from sglang.srt.layers.rotary_embedding import get_rope

    def table(positions):
        return get_rope(16, 16, positions, 10000, True, {"rope_type": "linear", "factor": 4.0})

    extended, whole = table(64), table(128).cos_sin_cache
    extended._ensure_cos_sin_cache_length(511)  # as SGLang does for the context
    assert torch.equal(extended.cos_sin_cache[:256], whole[:256])
    assert not torch.allclose(extended.cos_sin_cache[256:512], whole[256:], atol=0.5), "the control"

    longer = Case(QWEN2, {"max_sequence_length": 1024, "rope_scaling": {"type": "linear", "factor": 4.0}})
    with pytest.raises(Refused, match=r"beyond 1024 tokens.*the context is 4096; give --context-length 1024 or less"):
        check(longer)
    check(replace(longer, context=1024))


def test_an_override_that_sglang_does_not_read_is_refused():
    case = Case(LLAMA, {"rope_theta": 500.0}, override={"rope_theta": 900.0})
    with pytest.raises(Refused, match=r"rope_theta 900\.0, and 500\.0 among"):
        check(case)
    way_out = replace(case, override={"rope_scaling": {"rope_theta": 900.0}})
    assert way_out.model_config().hf_config.rope_parameters["rope_theta"] == 900.0
    check(way_out)


def test_the_class_that_was_loaded_decides():
    from sglang.srt.models.llama import LlamaForCausalLM, Phi3ForCausalLM

    check_class(object.__new__(LlamaForCausalLM), LLAMA)
    check_class(object.__new__(Phi3ForCausalLM), PHI3)
    impostor = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "mine"})
    for other in (Phi3ForCausalLM, impostor, type("TransformersForCausalLM", (), {})):
        with pytest.raises(Refused, match=f"loaded .*{other.__name__} for architecture LlamaForCausalLM"):
            check_class(object.__new__(other), LLAMA)


def test_a_class_that_sglang_may_not_import_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_DISABLED_MODEL_ARCHS", "qwen3,llama")
    with pytest.raises(Refused, match="SGLANG_DISABLED_MODEL_ARCHS=llama"):
        check(Case(LLAMA))
    check(Case(QWEN2))


def test_a_rank_refuses_the_class_that_it_loaded(monkeypatch):
    from sglang_shift.runtime import model_runner

    def load(self):
        self.model = type("TransformersForCausalLM", (), {})()

    loading = object.__new__(model_runner.ShiftModelRunner)
    loading.server_args, loading.model_config = None, Case(LLAMA).model_config()
    monkeypatch.setattr(model_runner.ModelRunner, "load_model", load)
    monkeypatch.setattr(model_runner, "shift_config_of", lambda _: SHIFT)
    monkeypatch.setattr(model_runner, "get_flags", lambda: SimpleNamespace(sp=SimpleNamespace()))
    monkeypatch.setattr(model_runner, "build_topology", lambda _: None)
    with pytest.raises(Refused, match="TransformersForCausalLM for architecture LlamaForCausalLM"):
        loading.load_model()


def test_a_window_is_refused_before_anything_starts(tmp_path):
    case = Case(MISTRAL, {"sliding_window": 64})
    case.write(str(tmp_path))
    flags = {"model_path": str(tmp_path), "tp_size": 2, "enable_shift_parallel": True}
    with pytest.raises(Refused, match=r"sliding_window 64.* 256 tokens .* give --context-length 64 or less"):
        resolve(ShiftServerArgs(**flags))
    resolve(ShiftServerArgs(**flags, context_length=64))


def test_every_rule_refuses_a_case():
    """A rule that no case meets might as well not be there."""
    longer = Case(QWEN2, {"max_sequence_length": 1024, "rope_scaling": {"type": "linear", "factor": 4.0}})
    theta = Case(LLAMA, {"rope_theta": 500.0}, override={"rope_theta": 900.0})
    cases = [longer, theta, *(case for case, *_ in REFUSED.values()), *(case for case, _ in NEITHER)]
    configs = [case.model_config() for case in cases]
    layered = transformers.LlamaConfig(architectures=[LLAMA], per_layer_config={1: {"rms_norm_eps": 0.5}})
    checkpoints = [Checkpoint(layered, 100), *(Checkpoint(each.hf_config, each.context_len) for each in configs)]
    met = {next(rule for rule in RULES if rule.problem(each)).subject for each in checkpoints}
    assert met == {rule.subject for rule in RULES}
