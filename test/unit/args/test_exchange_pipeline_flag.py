"""When ``--shift-exchange-pipeline`` is refused, and when it has no effect."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from sglang_shift.args import exchange_pipeline
from sglang_shift.args.exchange_pipeline import FEATURES, resolved_exchange_pipeline, why_not
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.resolution import shift_config_of

SHIFT = {"tp_size": 2, "enable_shift_parallel": True}


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return shift_config_of(args)


@pytest.mark.parametrize(
    ("value", "policy", "effective"),
    [
        (None, "calibrated", "off"),
        ("off", "calibrated", "off"),
        ("auto", "calibrated", "auto"),
        ("on", "calibrated", "on"),
        ("on", "tokens", "on"),
        ("auto", "tokens", "off"),
        ("auto", "sp", "off"),
    ],
)
def test_the_value_that_takes_effect(value, policy, effective, caplog):
    caplog.set_level(logging.INFO)
    assert resolved(**SHIFT, shift_policy=policy, shift_exchange_pipeline=value).exchange_pipeline == effective
    unused = f"The exchange is not pipelined, because --shift-policy {policy} has no calibration that times it."
    assert (unused in caplog.text) is (value == "auto" and effective == "off")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_size": 2}, "--shift-exchange-pipeline on needs --sp-size or --enable-shift-parallel"),
        ({**SHIFT, "shift_exchange_dtype": "fp8"}, "it does not combine with --shift-exchange-dtype fp8: a row would"),
        (
            {**SHIFT, "attention_backend": "torch_native"},
            "it needs the CPU platform's attention backend, or triton or fa3 on a GPU, and this server has "
            "torch_native on cpu; give auto or off",
        ),
        ({**SHIFT, "tp_size": 4, "dcp_size": 2}, "it does not combine with --dcp-size above 1"),
        ({**SHIFT, "lora_paths": ["a=/x"]}, "it does not combine with --enable-lora: it has not been tested"),
        ({**SHIFT, "tp_size": 8}, "a rank has 1 query heads for 1 KV heads, and it takes two for each KV head"),
    ],
)
def test_refused_at_resolution(fields, message):
    with pytest.raises(Refused) as refusal:
        resolved(**fields, shift_exchange_pipeline="on")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    if "tp_size" in fields and "enable_shift_parallel" in fields:
        assert resolved(**fields, shift_exchange_pipeline="auto").exchange_pipeline == "off"


ASKING = {
    "shift_exchange_dtype": "fp8", "shift_sparse_prefill": 0.1, "dcp_size": 2, "instances": 2,
    "speculative_algorithm": "NGRAM", "disaggregation_mode": "prefill", "enable_lora": True,
    "lora_paths": ["a=/x"],
}  # fmt: skip
PLAIN = {
    "shift_exchange_dtype": None, "shift_sparse_prefill": None, "dcp_size": 1, "instances": None,
    "speculative_algorithm": None, "disaggregation_mode": "null", "enable_lora": None, "lora_paths": None,
    "device": "cpu", "attention_backend": "triton", "prefill_attention_backend": None, "tp_size": 2,
    "decode_attention_backend": None,
}  # fmt: skip
CONFIG = ShiftConfig(2, 2, True, "calibrated", exchange_pipeline="on")


def model(name="LlamaForCausalLM", heads=(8, 2), generates=True):
    return SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[name]),
        is_generation=generates,
        num_attention_heads=heads[0],
        get_total_num_kv_heads=lambda: heads[1],
    )


@pytest.mark.parametrize("field", ASKING)
def test_features_that_it_does_not_combine_with(field):
    with pytest.raises(Refused, match=r"on is not possible, because it does not combine with .*; give auto or off"):
        resolved_exchange_pipeline(SimpleNamespace(**PLAIN | {field: ASKING[field]}), model(), CONFIG)


def test_every_feature_is_tested():
    asked = {feature.name for feature in FEATURES for field in ASKING
             if feature.is_requested(SimpleNamespace(**PLAIN | {field: ASKING[field]}))}  # fmt: skip
    assert asked == {feature.name for feature in FEATURES}


def test_adapters_that_are_ignored():
    """SGLang loads none if --no-enable-lora is given."""
    off = SimpleNamespace(**PLAIN | {"enable_lora": False, "lora_paths": ["a=/x"]})
    assert why_not(off, model()) is None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"])
def test_models_of_the_families(name):
    assert why_not(SimpleNamespace(**PLAIN), model(name)) is None


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (model("DeepseekV3ForCausalLM"), "it is tested for models of LlamaForCausalLM, .* this model is DeepseekV3For"),
        (model("Qwen2VLForConditionalGeneration"), "this model is Qwen2VLForConditionalGeneration"),
        (model(generates=False), "that generate text"),
        (model(heads=(8, 8)), "a rank has 4 query heads for 4 KV heads"),
        (model(heads=(4, 1)), None),
    ],
)
def test_other_models(model_config, reason):
    found = why_not(SimpleNamespace(**PLAIN), model_config)
    if reason is None:
        assert found is None
    else:
        with pytest.raises(Refused, match=reason):
            resolved_exchange_pipeline(SimpleNamespace(**PLAIN), model_config, CONFIG)


@pytest.mark.parametrize(
    ("backends", "graphs", "reason"),
    [
        (("triton", None), "disabled", None),
        (("fa3", None), "disabled", None),
        (("fa3", "triton"), "disabled", None),
        (("flashinfer", None), "disabled", "or triton or fa3 on a GPU, and this server has flashinfer on cuda"),
        (("fa3", "flashinfer"), "disabled", "this server has fa3 and flashinfer on cuda"),
        (("fa3", None), "breakable", "CUDA graphs of prefills have the ordinary exchange"),
    ],
)
def test_on_a_gpu(backends, graphs, reason, monkeypatch):
    monkeypatch.setattr(exchange_pipeline, "uses_shift_cpu_platform", lambda: False)
    config = SimpleNamespace(prefill=SimpleNamespace(backend=graphs))
    gpu = {"device": "cuda", "attention_backend": backends[0], "decode_attention_backend": backends[1]}
    settings = SimpleNamespace(**PLAIN | gpu, cuda_graph_config=config)
    if reason is None:
        assert resolved_exchange_pipeline(settings, model(), CONFIG) == ("on", "")
    else:
        with pytest.raises(Refused, match=reason):
            resolved_exchange_pipeline(settings, model(), CONFIG)
