"""--dcp-size: what `auto` is, and what is refused, before any process is started."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.configs.model_config import AttentionArch
from sglang_shift.args import dcp_size
from sglang_shift.args.dcp_size import FEATURES, check_dcp_size, largest
from sglang_shift.args.server_args import ShiftServerArgs, prepare_server_args
from sglang_shift.args.sp_size import pool_of
from sglang_shift.errors import Refused, ShiftError
from sglang_shift.flags import parse_ranks
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.models.heads import Heads
from sglang_shift.models.sizes import GIB
from sglang_shift.models.token_shards import check_token_shards, most_token_shards

DEMO = json.loads(Path(demo_model_path(), "config.json").read_text())  # 8 heads, 2 KV heads
SHIFT = {"tp_size": 4, "enable_shift_parallel": True}


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return args


def dcp_size_of(**fields):
    return resolution_result(resolved(**fields), "dcp_size")


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "most"),
    [(2, 4, 2), (2, 8, 4), (1, 8, 8), (8, 8, 1), (8, 4, 1), (8, 16, 2), (4, 8, 2)],
)
def test_ranks_that_hold_the_same_kv_head(kv_heads, ranks, most):
    heads = Heads(64, kv_heads)
    assert most_token_shards(heads, ranks) == most
    for count in range(1, ranks + 1):
        if most % count == 0:
            check_token_shards(heads, ranks, count)
        else:
            with pytest.raises(Refused, match=f"--dcp-size {count} "):
                check_token_shards(heads, ranks, count)


@pytest.mark.parametrize(("tp_size", "expected"), [(2, 1), (4, 2), (8, 4)])
def test_auto_is_p_over_the_kv_heads(tp_size, expected):
    assert dcp_size_of(tp_size=tp_size, enable_shift_parallel=True, dcp_size="auto") == expected
    assert dcp_size_of(tp_size=tp_size, sp_size=2, dcp_size="auto") == expected


def test_numbers_and_the_default():
    assert dcp_size_of(**SHIFT) == 1
    assert dcp_size_of(**SHIFT, dcp_size=2) == 2
    assert dcp_size_of(tp_size=8, sp_size=2, dcp_size=2) == 2, "a divisor"


def test_the_command_line_and_a_file(tmp_path):
    for option in ("--dcp-size", "--decode-context-parallel-size"):
        assert prepare_server_args(["--tp-size", "4", option, "auto"]).dcp_size == "auto"
        assert prepare_server_args(["--tp-size", "4", option, "2"]).dcp_size == 2
    file = tmp_path / "server.yaml"
    file.write_text("tp-size: 4\nenable-shift-parallel: true\ndcp-size: auto\n")
    args = prepare_server_args(["--config", str(file)])
    resolve(args)
    assert resolution_result(args, "dcp_size") == 2


@pytest.mark.parametrize("text", ["", "two", "1.5", "AUTO"])
def test_values_that_are_not_a_count(text):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a whole number of ranks nor 'auto'"):
        parse_ranks(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp_size": 2, "sp_size": 2, "dcp_size": 2}, "--dcp-size 2 is not possible with --tp-size 2 and 2 KV heads"),
        ({**SHIFT, "dcp_size": 4}, "--dcp-size 4 does not divide the 2 ranks that hold the same KV head"),
        ({"tp_size": 8, "sp_size": 8, "dcp_size": 3}, "give auto, which is 4 here, or a smaller divisor of 4"),
        ({**SHIFT, "dcp_size": "all"}, "--dcp-size 'all' is neither a whole number of ranks nor 'auto'"),
        ({**SHIFT, "dcp_size": True}, "--dcp-size True is neither"),
        ({**SHIFT, "dcp_size": 0}, "must be >= 1"),
        ({"tp_size": 4, "dcp_size": "auto"}, "--dcp-size auto needs --sp-size or --enable-shift-parallel"),
        (
            {**SHIFT, "dcp_size": 2, "attention_backend": "torch_native"},
            "--dcp-size 2 needs --attention-backend triton, or fa3 on GPUs of NVIDIA, for prefills and decodes alike, "
            "and the attention backend is torch_native",
        ),
        (
            {**SHIFT, "dcp_size": "auto", "enable_hierarchical_cache": True},
            "--enable-hierarchical-cache cannot be combined with --dcp-size 2: its copies on the host are not divided",
        ),
        (
            {**SHIFT, "shift_policy": "tp", "dcp_size": 2, "enable_deterministic_inference": True},
            "--enable-deterministic-inference cannot be combined with --dcp-size 2: the sums of attention are",
        ),
        ({**SHIFT, "dcp_size": 2, "speculative_algorithm": "NGRAM"}, "--speculative-algorithm cannot be combined"),
    ],
)
def test_refused_at_resolution(flags, message):
    with pytest.raises(ShiftError) as refusal:
        resolved(**flags)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


ASKING = {
    "enable_hierarchical_cache": True, "enable_lmcache": True, "enable_flexkv": True, "radix_cache_backend": "other",
    "enable_unified_cache_external_linker": True, "enable_hisparse": True,
    "enable_unified_memory": True, "enable_kv_cache_sharding": True, "kv_cache_dtype": "fp4_e2m1",
    "enable_deterministic_inference": True, "speculative_algorithm": "EAGLE", "disaggregation_mode": "decode",
}  # fmt: skip


def test_every_feature_is_asked_for_by_its_field():
    plain = resolved(**SHIFT, dcp_size=2)
    assert set(ASKING) <= set(plain.__struct_fields__)
    settings = {name: resolution_result(plain, name) for name in plain.__struct_fields__}
    assert not any(feature.is_requested(SimpleNamespace(**settings)) for feature in FEATURES)
    asked_for = [
        [feature.name for feature in FEATURES if feature.is_requested(SimpleNamespace(**{**settings, name: value}))]
        for name, value in ASKING.items()
    ]
    assert asked_for == [[feature.name] for feature in FEATURES]


def settings(backend="triton", **others):
    plain = {
        "prefill_attention_backend": None, "decode_attention_backend": None, "dcp_size": 2, "kv_cache_dtype": "auto",
    }  # fmt: skip
    return SimpleNamespace(tp_size=4, attention_backend=backend, **{**plain, **others})


def model(name="LlamaForCausalLM", arch=AttentionArch.MHA, *, windows=False, encoder=False, **fields):
    return SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[name], **fields), attention_arch=arch, num_attention_heads=8,
        get_total_num_kv_heads=lambda: 2, is_hybrid_swa=windows, is_encoder_decoder=encoder,
    )  # fmt: skip


@pytest.fixture
def on_gpus(monkeypatch):
    monkeypatch.setattr(dcp_size, "uses_shift_cpu_platform", lambda: False)


@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "torch_native", "flex_attention"])
def test_backends_that_would_silently_be_wrong(backend):
    """SGLang's FA3 and FlashInfer write each token at its slot in the group, as if it were a row of the rank's pool."""
    check_dcp_size(settings(), model())
    for wrong in (settings(backend), settings(decode_attention_backend=backend)):
        with pytest.raises(Refused, match=f"needs --attention-backend triton, or fa3 .*backend is.* {backend}"):
            check_dcp_size(wrong, model())


def test_fa3_on_gpus_of_nvidia(on_gpus, monkeypatch):
    check_dcp_size(settings(), model())
    with pytest.raises(Refused, match="and the attention backend is fa3"):
        check_dcp_size(settings("fa3"), model())
    monkeypatch.setattr(dcp_size, "is_cuda", lambda: True)
    check_dcp_size(settings("fa3"), model())
    check_dcp_size(settings("fa3", kv_cache_dtype="bfloat16"), model())
    check_dcp_size(settings(kv_cache_dtype="fp8_e4m3"), model())
    for mixed in (settings("fa3", prefill_attention_backend="triton"), settings(decode_attention_backend="fa3")):
        with pytest.raises(Refused, match="and the attention backend is fa3 and triton; give one of them"):
            check_dcp_size(mixed, model())
    for backend in ("fa4", "flashinfer"):
        with pytest.raises(Refused, match=f"and the attention backend is {backend}"):
            check_dcp_size(settings(backend), model())
    with pytest.raises(Refused, match="--kv-cache-dtype fp8_e4m3 is not served with --dcp-size 2 and --attention-b"):
        check_dcp_size(settings("fa3", kv_cache_dtype="fp8_e4m3"), model())
    with pytest.raises(Refused, match=r"latent attention \(MLA\) on GPUs"):
        check_dcp_size(settings("fa3"), latents())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (model("XForCausalLM", encoder=True), "XForCausalLM, because its decoder reads the keys of an encoder"),
        (model("XForCausalLM", windows=True), "XForCausalLM, because it has layers with a sliding window"),
        (
            model("XForCausalLM", layer_types=["full_attention", "linear_attention"]),
            "XForCausalLM, because it has layers of type linear_attention",
        ),
        (
            model("Gemma3ForConditionalGeneration", text_config=SimpleNamespace(layer_types=["sliding_attention"])),
            "Gemma3ForConditionalGeneration, because it has layers of type sliding_attention",
        ),
    ],
)
def test_models_that_are_not_served(config, message):
    with pytest.raises(Refused) as refusal:
        check_dcp_size(settings(), config)
    assert message in str(refusal.value)


def latents(**fields):
    return model("DeepseekV3ForCausalLM", AttentionArch.MLA, **fields)


def test_all_ranks_hold_the_same_latents():
    """So D is any divisor of P, whatever number of KV heads the model's configuration has."""
    assert largest(latents(), 4) == (4, ", because all ranks hold the same latents")
    for count in (2, 4):
        check_dcp_size(settings(dcp_size=count), latents())
    with pytest.raises(Refused, match=r"--dcp-size 3 does not divide --tp-size 4; with latent attention \(MLA\) give"):
        check_dcp_size(settings(dcp_size=3), latents())
    with pytest.raises(Refused, match="needs --attention-backend triton"):
        check_dcp_size(settings("torch_native"), latents())


def test_latents_on_gpus(on_gpus):
    assert largest(latents(), 4) == (1, ", because latents are not divided on GPUs")
    assert largest(model(), 4)[0] == 2
    with pytest.raises(Refused) as refusal:
        check_dcp_size(settings(), latents())
    assert "latent attention (MLA) on GPUs, as in DeepseekV3ForCausalLM" in str(refusal.value)


def test_windows_that_no_class_applies_do_not_matter():
    check_dcp_size(settings(), model("MistralForCausalLM", sliding_window=8))
    check_dcp_size(settings(), model("XForCausalLM", layer_types=["full_attention"] * 2))


def test_one_rank_alone_needs_nothing():
    check_dcp_size(SimpleNamespace(dcp_size=1), None)


def test_a_request_takes_a_part_of_each_pool():
    """--sp-size auto leaves room for the longest request, which D ranks share."""
    config = SimpleNamespace(hf_config=SimpleNamespace(**DEMO), context_len=4096, dtype=SimpleNamespace(itemsize=4))
    fields = {"kv_cache_dtype": "auto", "tp_size": 8, "max_total_tokens": None}
    one, four = (pool_of(SimpleNamespace(**fields, dcp_size=count), config, 64 * GIB) for count in (1, 4))
    longest = 4096 * 4 * 2 * 32 * 4  # a KV head of each of 4 layers
    assert (one.minimum, four.minimum) == (longest, longest // 4)
    asked = [pool_of(SimpleNamespace(**{**fields, "max_total_tokens": 100}, dcp_size=n), config, GIB) for n in (1, 4)]
    assert asked[0].target == asked[1].target, "--max-total-tokens counts rows of each rank"


def test_a_log_line_says_what_auto_is(caplog):
    with caplog.at_level(logging.INFO):
        resolved(**SHIFT, dcp_size="auto")
    assert "--dcp-size auto: D=2 is the number of ranks that hold the same KV head" in caplog.text
