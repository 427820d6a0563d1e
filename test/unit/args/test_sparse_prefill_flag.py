"""What ``--shift-sparse-prefill`` is refused with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.configs.model_config import AttentionArch
from sglang_shift.args import sparse_prefill
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.args.sparse_prefill import FEATURES, check_sparse_prefill
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.resolution import shift_config_of

SHIFT = {"tp_size": 2, "enable_shift_parallel": True, "shift_policy": "tokens"}


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return args


@pytest.mark.parametrize("share", [None, 0.0, 0.05])
def test_the_share_is_a_setting(share):
    assert shift_config_of(resolved(**SHIFT, shift_sparse_prefill=share)).sparse_prefill == (share or 0.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp_size": 2, "shift_sparse_prefill": 0.1}, "needs --sp-size or --enable-shift-parallel; without them stock"),
        ({**SHIFT, "shift_sparse_prefill": 1.0}, "--shift-sparse-prefill 1 is no share of the softmax mass"),
        ({**SHIFT, "shift_sparse_prefill": -0.1}, "--shift-sparse-prefill -0.1 is no share"),
        ({**SHIFT, "shift_sparse_prefill": float("nan")}, "--shift-sparse-prefill nan is no share"),
        (
            {**SHIFT, "shift_sparse_prefill": 0.1, "attention_backend": "torch_native"},
            "needs the CPU platform's attention backend, and this server has torch_native on cpu",
        ),
        (
            {"tp_size": 4, "enable_shift_parallel": True, "dcp_size": 2, "shift_sparse_prefill": 0.1},
            "--dcp-size above 1 cannot be combined with --shift-sparse-prefill 0.1: no rank has all keys",
        ),
    ],
)
def test_refused_at_resolution(flags, message):
    with pytest.raises(Refused) as refusal:
        resolved(**flags)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


ASKING = {
    "enable_deterministic_inference": True, "dcp_size": 2, "speculative_algorithm": "NGRAM",
    "disaggregation_mode": "prefill", "enable_hierarchical_cache": True, "enable_lmcache": True,
    "kv_events_config": "{}", "enable_flexkv": True, "radix_cache_backend": "other",
    "enable_unified_cache_external_linker": True,
}  # fmt: skip
PLAIN = {
    "enable_flexkv": False, "radix_cache_backend": None, "enable_unified_cache_external_linker": False,
    "enable_deterministic_inference": False, "dcp_size": 1, "speculative_algorithm": None,
    "disaggregation_mode": "null", "enable_hierarchical_cache": False, "enable_lmcache": False,
    "kv_events_config": None, "device": "cpu", "attention_backend": "triton", "prefill_attention_backend": None,
    "decode_attention_backend": None,
}  # fmt: skip
CONFIG = ShiftConfig(2, 2, True, "tokens", sparse_prefill=0.1)


def model(name="LlamaForCausalLM", arch=AttentionArch.MHA, generates=True, **fields):
    hf_config = SimpleNamespace(architectures=[name], **fields)
    return SimpleNamespace(hf_config=hf_config, attention_arch=arch, is_generation=generates)


def check(model_config, **fields):
    check_sparse_prefill(SimpleNamespace(**PLAIN | fields), model_config, CONFIG)


def test_a_plain_model_on_a_cpu_is_served():
    check(model())


@pytest.mark.parametrize("field", ASKING)
def test_features_that_must_be_exact(field):
    with pytest.raises(Refused, match=r"cannot be combined with --shift-sparse-prefill 0\.1: .*leave one of them out"):
        check(model(), **{field: ASKING[field]})


def test_every_feature_is_tested():
    asked = {feature.name for feature in FEATURES for field in ASKING
             if feature.is_requested(SimpleNamespace(**PLAIN | {field: ASKING[field]}))}  # fmt: skip
    assert asked == {feature.name for feature in FEATURES}


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (model("DeepseekV3ForCausalLM", AttentionArch.MLA), "its latent attention (MLA) has one key for all heads"),
        (model("BertModel", generates=False), "it generates no text"),
        (model("Gemma2ForCausalLM", layer_types=["sliding_attention", "full_attention"]), "sliding_attention"),
        (
            model("Gemma3ForConditionalGeneration", text_config=SimpleNamespace(layer_types=["sliding_attention"])),
            "it has layers of type sliding_attention",
        ),
    ],
)
def test_models_that_must_be_exact(model_config, reason):
    with pytest.raises(Refused) as refusal:
        check(model_config)
    assert reason in str(refusal.value)


def test_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(sparse_prefill, "uses_shift_cpu_platform", lambda: False)
    with pytest.raises(Refused, match="this server has triton on cuda; leave it out"):
        check(model(), device="cuda")
