"""Every refusal: at resolution, before any process is started, in one sentence with its reason."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.layers.quantization import unquant
from sglang_shift.args.gemm_backend import SPLIT_K, adjust_gemm_backend
from sglang_shift.args.mixed_chunks import can_mix
from sglang_shift.args.model_check import check_model
from sglang_shift.args.refusals import FEATURES, check_flags
from sglang_shift.args.server_args import ShiftServerArgs, prepare_server_args
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused, ShiftError
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.models.families import FAMILIES, WITH_IMAGES
from sglang_shift.resolution import shift_config_of
from tiny_models import IMAGES, MODELS

SHIFT = {"tp_size": 2, "enable_shift_parallel": True}
EAGLE = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": demo_model_path()}
TREES = {"speculative_num_steps": 5, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 8}


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return args


def value(args, name):
    return resolution_result(args, name)


def test_without_our_flags_nothing_of_ours_is_set():
    args = resolved(tp_size=2)
    assert shift_config_of(args) is None
    assert [value(args, name) for name in ("sp_size", "shift_policy", "shift_threshold")] == [None] * 3


def test_defaults_with_shift():
    args = resolved(tp_size=4, enable_shift_parallel=True)
    assert shift_config_of(args) == ShiftConfig(4, 4, True, "calibrated", calibration="auto")
    fields = ("sp_size", "shift_policy", "shift_threshold", "shift_calibration")
    assert [value(args, name) for name in fields] == [4, "calibrated", None, "auto"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"shift_threshold": 20}, ShiftConfig(2, 2, True, "tokens", 20)),
        ({"shift_calibration": "off"}, ShiftConfig(2, 2, True, "tokens")),
        (
            {"shift_exchange": "collective"},
            ShiftConfig(2, 2, True, "calibrated", calibration="auto", exchange="collective"),
        ),
        (
            {"shift_exchange_dtype": "fp8"},
            ShiftConfig(2, 2, True, "calibrated", calibration="auto", exchange_dtype="fp8"),
        ),
        ({"shift_calibration": "here.json"}, ShiftConfig(2, 2, True, "calibrated", calibration="here.json")),
        (
            {"shift_policy": "queue-depth", "shift_enter_requests": 8, "shift_leave_requests": 8},
            ShiftConfig(2, 2, True, "queue-depth", enter_requests=8, leave_requests=8),
        ),
        ({"shift_policy": "prompts:NotAPolicy"}, None),
    ],
)
def test_policies_and_their_settings(flags, expected):
    if expected is None:
        with pytest.raises(Refused, match="cannot be loaded"):
            resolved(**SHIFT, **flags)
    else:
        assert shift_config_of(resolved(**SHIFT, **flags)) == expected


@pytest.mark.parametrize(
    ("flags", "mixed"),
    [
        ({}, False),
        ({"shift_tbt_target": 0.0}, False),
        ({"shift_tbt_target": 50.0}, True),
        ({"enable_mixed_chunk": True}, True),
        ({"shift_tbt_target": 50.0, "speculative_algorithm": "NGRAM"}, False),
    ],
)
def test_a_target_turns_mixed_chunks_on_if_sglang_can_mix(flags, mixed):
    args = resolved(**SHIFT, **flags)
    assert value(args, "enable_mixed_chunk") is mixed
    assert shift_config_of(args).tbt_target == flags.get("shift_tbt_target", 0.0)


def test_graphs_that_do_not_take_mixed_chunks():
    def settings(backend, **changes):
        graphs = SimpleNamespace(prefill=SimpleNamespace(backend=backend))
        fields = {"cuda_graph_config": graphs, "speculative_algorithm": None, "enable_hisparse": False}
        return SimpleNamespace(**fields | changes)

    assert [can_mix(settings(backend)) for backend in ("breakable", "disabled", "tc_piecewise")] == [True, True, False]
    assert not can_mix(settings("disabled", enable_hisparse=True))


def test_trees_of_drafts_need_a_gpu():
    """SGLang's own choice for a Llama is four drafts for each draft of the step before."""
    args = resolved(**SHIFT, **EAGLE)
    assert [value(args, name) for name in TREES] == [3, 1, 4]
    assert value(resolved(**SHIFT, speculative_algorithm="NGRAM"), "speculative_eagle_topk") > 1


def test_sp_size_alone_is_sp_for_every_step():
    assert shift_config_of(resolved(tp_size=4, sp_size=2)) == ShiftConfig(4, 2, False, "sp")


def test_command_line_serves_the_demo_model_by_default():
    args = prepare_server_args(["--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "8"])
    assert args.model_path == demo_model_path()
    assert args.shift_threshold == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp_size": 4, "sp_size": 3}, "--sp-size 3 does not divide --tp-size 4"),
        ({"tp_size": 2, "sp_size": 4}, "--sp-size 4 does not divide --tp-size 2"),
        ({"tp_size": 2, "sp_size": 1}, "--sp-size 1 is not sequence parallelism"),
        ({"tp_size": 1, "enable_shift_parallel": True}, "--tp-size 1 leaves nothing to shift"),
        ({"tp_size": 2, "sp_size": 2, "shift_policy": "tp"}, "--shift-policy tp needs --enable-shift-parallel"),
        ({"tp_size": 2, "shift_threshold": 9}, "--shift-threshold 9 needs --enable-shift-parallel"),
        ({**SHIFT, "shift_threshold": -1}, "--shift-threshold -1 must be 0 or more"),
        ({**SHIFT, "shift_policy": "sp", "shift_threshold": 9}, "no meaning with --shift-policy sp"),
        ({**SHIFT, "shift_enter_requests": 9}, "no meaning with --shift-policy calibrated"),
        ({**SHIFT, "shift_policy": "queue-depth", "shift_leave_tokens": 9000}, "not be above --shift-enter-tokens"),
        ({**SHIFT, "shift_policy": "fastest"}, "--shift-policy fastest is unknown"),
        ({**SHIFT, "shift_policy": "json:JSONDecoder"}, "is not a sglang_shift.modes.ShiftPolicy"),
        ({**SHIFT, "shift_policy": "calibrated", "shift_calibration": "off"}, "needs a calibration"),
        ({**SHIFT, "shift_policy": "tp", "shift_calibration": "here.json"}, "no meaning with --shift-policy tp"),
        ({"tp_size": 2, "sp_size": 2, "shift_calibration": "off"}, "--shift-calibration off needs --enable-shift"),
        ({"tp_size": 16, "sp_size": 16}, "does not divide the model's 8 attention heads"),
        ({"tp_size": 2, "shift_exchange": "auto"}, "--shift-exchange auto needs --sp-size or --enable-shift-parallel"),
        ({**SHIFT, "shift_exchange": "flashinfer"}, "flashinfer is not possible: it needs CUDA, and the device is cpu"),
        ({"tp_size": 2, "shift_exchange_dtype": "fp8"}, "--shift-exchange-dtype fp8 needs --sp-size or --enable-shift"),
        (
            {**SHIFT, "shift_exchange": "flashinfer", "shift_exchange_dtype": "fp8"},
            "flashinfer is not possible: it sends activations as they are, and --shift-exchange-dtype is fp8",
        ),
        ({**SHIFT, "model_path": "/does/not/exist"}, "/does/not/exist does not exist"),
        ({"tp_size": 2, "shift_tbt_target": 50.0}, "--shift-tbt-target 50.0 needs --enable-shift-parallel"),
        ({**SHIFT, "shift_tbt_target": -1.5}, "--shift-tbt-target -1.5 must be 0 or more"),
        ({**SHIFT, "shift_tbt_target": float("nan")}, "--shift-tbt-target nan must be 0 or more"),
        (
            {**SHIFT, "shift_tbt_target": 50.0, "shift_policy": "tp"},
            "--shift-policy tp has none; give --shift-policy cal",
        ),
        ({**SHIFT, "shift_tbt_target": 50.0, "shift_calibration": "off"}, "--shift-policy tokens has none"),
        ({**SHIFT, "shift_tbt_target": 50.0, "chunked_prefill_size": -1}, "leave out --chunked-prefill-size -1"),
        ({**SHIFT, "shift_tbt_target": 50.0, "disaggregation_mode": "prefill"}, "with --disaggregation-mode prefill"),
        (
            {**SHIFT, "shift_policy": "tp", "enable_deterministic_inference": True},
            "--enable-deterministic-inference needs a GPU, and the device is cpu; leave it out",
        ),
        (
            {"tp_size": 2, "sp_size": 2, "enable_deterministic_inference": True},
            "--enable-deterministic-inference needs a GPU, and the device is cpu; leave it out",
        ),
        ({**SHIFT, **EAGLE, **TREES}, "--speculative-eagle-topk 4 needs a GPU, and the device is cpu; give 1"),
    ],
)
def test_refused_at_resolution(flags, message):
    with pytest.raises(ShiftError, match=message.replace("(", r"\(")) as refusal:
        resolved(**flags)
    assert "\n" not in str(refusal.value)


ASKING = {
    "pp_size": 2, "attn_dp_size": 2, "attn_cp_size": 2, "enable_layernorm_sp": True,
    "enable_attn_tp_input_scattered": True, "moe_a2a_backend": "deepep", "ep_size": 2,
    "enable_return_routed_experts": True,
    "enable_two_batch_overlap": True, "enable_pdmux": True,
    "speculative_algorithm": "DFLASH", "speculative_adaptive": True, "enable_multi_layer_eagle": True,
    "speculative_use_rejection_sampling": True, "enable_torch_compile": True,
    "cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full")),
    "dllm_algorithm": "x", "elastic_ep_backend": "mooncake", "use_ray": True, "encoder_only": True,
    "language_only": True, "grpc_mode": True, "weight_cache_mode": "on", "startup_weight_load_mode": "overlap",
    "enable_pd_role_switch": True,
    "debug_cuda_graph": True, "remote_instance_weight_loader_start_seed_via_transfer_engine": True,
    "load_format": "sharded_state", "enable_memory_saver": True, "cpu_offload_gb": 1,
    "model_impl": "transformers", "enable_deterministic_inference": True, "rl_on_policy_target": "fsdp",
    "enable_return_aux_hidden_states": True, "enable_nvidia_megakernel": True,
    "enable_mscclpp": True, "enable_lora": True, "SGLANG_RUST_SERVER": True,
    "SGLANG_ENABLE_PCG_DSV2_DUAL_STREAM": True,
}  # fmt: skip


REPLICATED = {"shift_experts": "replicated"}
ALSO = {
    "enable_mscclpp": {"enable_symm_mem": True}, "ep_size": REPLICATED, "enable_return_routed_experts": REPLICATED,
    "enable_lora": {"enable_deterministic_inference": True, "shift_policy": "sp"},
}  # fmt: skip
"""With which other settings a feature is refused; alone it is served."""


def test_every_feature_in_the_list_has_a_case():
    assert len(ASKING) == len(FEATURES)


@pytest.mark.parametrize(
    "field",
    [
        "enable_mscclpp",
        "enable_symm_mem",
        "enable_torch_symm_mem",
        "enable_nccl_nvls",
        "enable_flashinfer_allreduce_fusion",
        "pre_warm_nccl",
        "disable_custom_all_reduce",
    ],
)
def test_ways_to_communicate_that_are_served(field):
    """docs/usage.md, SGLang's flags for communication."""
    plain = resolved(**SHIFT)
    check_flags(SimpleNamespace(**{**{name: value(plain, name) for name in plain.__struct_fields__}, field: True}))


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_lora": True},
        {"quantization": "fp8"},
        {"ep_size": 2, "shift_experts": "sharded"},
        {"enable_return_routed_experts": True, "shift_experts": "sharded"},
    ],
    ids=str,
)
def test_features_that_are_served(settings):
    plain = resolved(**SHIFT)
    check_flags(SimpleNamespace(**{**{name: value(plain, name) for name in plain.__struct_fields__}, **settings}))


@pytest.mark.parametrize("field", ASKING)
def test_features_that_do_not_combine(field, monkeypatch):
    """The settings as SGLang resolves them, with one feature asked for, by a field or an environment variable."""
    plain = resolved(**SHIFT)
    names = {name: value(plain, name) for name in plain.__struct_fields__}
    names.update(ALSO.get(field, {}))
    check_flags(SimpleNamespace(**names))
    if field.isupper():
        monkeypatch.setenv(field, "1")
    with pytest.raises(Refused, match="cannot be combined with sequence parallelism: "):
        check_flags(SimpleNamespace(**{**names, field: ASKING[field]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MuseSparkForConditionalGeneration"]},
            "because its class in SGLang shards tokens in its own",
        ),
        ({"architectures": ["Gemma3nForCausalLM"]}, "because its layers keep several streams in one tensor"),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "because its sparse attention chooses tokens by the hidden"),
        ({"architectures": ["LlamaForCausalLM"], "index_topk": 64}, "architecture LlamaForCausalLM is not served"),
        ({"architectures": ["GemmaForCausalLM"], "num_key_value_heads": 3}, "3 KV heads"),
        ({"num_attention_heads": 6}, "6 attention heads"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"intermediate_size": 770}, "intermediate size 770"),
    ],
)
def test_models_that_are_not_served(changes, message):
    with pytest.raises(Refused, match=message):
        check_model(demo_config(**changes), ShiftConfig(4, 4, True, "tokens", 256))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GemmaForCausalLM"]},
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
        # The fields of a family are not those of other models: these compute what they say.
        {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 64, "hidden_act": "gelu_pytorch_tanh"},
        {"architectures": ["GPT2LMHeadModel"], "intermediate_size": None},
        {"architectures": ["Glm4MoeForCausalLM"], "intermediate_size": [768, 768]},
    ],
    ids=lambda changes: changes["architectures"][0],
)
def test_any_architecture_may_be_served(changes):
    """A rank looks at its layers after loading: test/unit/layers/test_structure.py."""
    check_model(demo_config(**changes), ShiftConfig(4, 4, True, "tokens", 256))


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "fp8", "awq", "gptq", "compressed-tensors"])
def test_formats_whose_shards_cannot_be_stacked(method):
    """A rank looks at the tensors of other formats after loading."""
    model, config = demo_config(quantization_config={"quant_method": method}), ShiftConfig(4, 4, True, "tokens", 256)
    model.quantization = method
    if method in ("bitsandbytes", "gguf"):
        with pytest.raises(Refused, match=f"weights quantized with {method} are not served"):
            check_model(model, config)
    else:
        check_model(model, config)


def test_a_model_may_have_no_field_for_the_size_of_its_mlp():
    model = demo_config(architectures=["GPT2LMHeadModel"])
    del model.hf_config.intermediate_size
    check_model(model, ShiftConfig(4, 4, True, "tokens", 256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        # Latents are gathered, and not exchanged by heads.
        ({"head_dim": 6, "kv_lora_rank": 32, "architectures": ["DeepseekV3ForCausalLM"]}, None),
        # 2 heads and half a KV head, replicated, a rank: 4 heads of QKV, 2 of O.
        ({"head_dim": 8}, None),
        ({"head_dim": 4}, "fp8 takes a multiple of 16 columns, and with --tp-size 4 a rank has 8 of O; give auto"),
        ({"head_dim": 6}, "with --tp-size 4 a rank has 24 of QKV; give auto"),
    ],
)
def test_widths_that_fp8_does_not_take(changes, message):
    model, fp8 = demo_config(**changes), ShiftConfig(4, 2, True, "tokens", exchange_dtype="fp8")
    check_model(model, replace(fp8, exchange_dtype="auto"))
    if message is None:
        check_model(model, fp8)
    else:
        with pytest.raises(Refused, match=message):
            check_model(model, fp8)


def demo_config(**changes):
    """What is read of SGLang's configuration of a model, here the demo model with some changes."""
    fields = json.loads(Path(demo_model_path(), "config.json").read_text())
    fields.update(changes)
    return SimpleNamespace(
        hf_config=SimpleNamespace(**fields),
        quantization=None,
        is_generation=True,
        is_multimodal=False,
        context_len=fields["max_position_embeddings"],
        head_dim=fields["head_dim"],
        num_attention_heads=fields["num_attention_heads"],
        get_total_num_kv_heads=lambda: fields["num_key_value_heads"],
    )


def image_config(name, **changes):
    """The same of a model with images, whose language model is the demo model."""
    model = demo_config()
    model.is_multimodal = True
    model.hf_config.__dict__.update(changes)
    model.hf_config = SimpleNamespace(architectures=[name], text_config=model.hf_config)
    return model


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen2_5_VLForConditionalGeneration", {}, None),
        ("Qwen3VLMoeForConditionalGeneration", {}, None),
        (
            "Gemma3ForConditionalGeneration",
            {"intermediate_size": 97},
            "does not divide the model's intermediate size 97",
        ),
        ("Qwen3VLMoeForConditionalGeneration", {"mlp_only_layers": [1]}, r"has mlp_only_layers \[1\], which SGLang's"),
        ("LlavaForConditionalGeneration", {}, "its answers about images or sounds are not tested; serve it without"),
    ],
)
def test_models_with_images(name, changes, message):
    model, config = image_config(name, **changes), ShiftConfig(2, 2, True, "tokens")
    if message is None:
        check_model(model, config)
    else:
        with pytest.raises(Refused, match=message):
            check_model(model, config)


@pytest.mark.parametrize("adapters", [{"enable_lora": True}, {"lora_paths": ["a"]}])
def test_adapters_of_a_deterministic_server(adapters):
    """A request without an adapter ran in SP alone, and in TP beside a request with one."""

    def settings(**flags):
        plain = resolved(**flags)
        names = {name: value(plain, name) for name in plain.__struct_fields__}
        return SimpleNamespace(**names | {"enable_deterministic_inference": True, **adapters})

    check_flags(settings(**SHIFT, shift_policy="tp"))
    with pytest.raises(Refused, match="with --enable-lora or --lora-paths, and without --shift-policy tp cannot"):
        check_flags(settings(**SHIFT, shift_policy="sp"))


def test_images_of_a_deterministic_server():
    model = image_config("Qwen2_5_VLForConditionalGeneration")
    check_model(model, ShiftConfig(2, 2, True, "tp"), deterministic=True)
    with pytest.raises(Refused, match="with Qwen2_5_VLForConditionalGeneration needs --shift-policy tp, because steps"):
        check_model(model, ShiftConfig(2, 2, False, "sp"), deterministic=True)
    check_model(demo_config(), ShiftConfig(2, 2, False, "sp"), deterministic=True)


@pytest.mark.parametrize("label", ["replica", "mode", "phase", "kind", "le"])
def test_labels_that_our_metrics_have(label):
    """Each event raised a TypeError, so there were no metrics at all."""
    resolved(**SHIFT, enable_metrics=True, extra_metric_labels={"cluster": "a"})
    resolved(**SHIFT, extra_metric_labels={label: "a"})
    with pytest.raises(Refused, match=f"--extra-metric-labels has {label}, which metrics of sglang_shift have"):
        resolved(**SHIFT, enable_metrics=True, extra_metric_labels={label: "a"})


def test_every_model_with_images_is_compared():
    assert {model.architecture for model in MODELS.values() if model.group == IMAGES} == set(WITH_IMAGES)


def test_every_family_has_a_tiny_model():
    assert set(families.FAMILIES) == set(FAMILIES)


def test_split_k_products_are_switched_off_where_sglang_has_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.delenv(SPLIT_K, raising=False)
    adjust_gemm_backend("cpu")
    assert SPLIT_K not in os.environ
    adjust_gemm_backend("cuda")
    assert os.environ[SPLIT_K] == "0"
    monkeypatch.setenv(SPLIT_K, "1")
    with pytest.raises(Refused, match=f"{SPLIT_K}=1 cannot be combined"):
        adjust_gemm_backend("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    adjust_gemm_backend("cuda")


@pytest.mark.parametrize(
    ("device", "backend", "said"), [("cuda", "gemv", True), ("cuda", "auto", False), ("cpu", "gemv", False)]
)
def test_it_is_said_where_gemv_does_not_reach(monkeypatch, caplog, device, backend, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    adjust_gemm_backend(device, backend)
    assert ("in TP steps O and down" in caplog.text) is said


def test_sglangs_gemv_leaves_views_of_columns_to_cublas(monkeypatch):
    """What the log line says: packed weights, slices of rows among them, go to the kernel, slices of columns do not."""
    taken = []
    monkeypatch.setattr(unquant, "_use_hopper_bf16_gemv", lambda m, n, k: m == 1)
    monkeypatch.setattr(unquant, "_hopper_bf16_gemv", lambda x, weight: taken.append(weight.shape) or x @ weight.T)
    base, x = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(1, 128, dtype=torch.bfloat16)
    for view, row in ((base, x), (base[16:32], x), (base[:, 64:], x[:, 64:].contiguous())):
        product = unquant._bf16_gemm_dispatch_impl(row, view, None)
        assert torch.allclose(product.float(), row.float() @ view.float().T, rtol=0.05, atol=0.5)
    assert taken == [(64, 128), (16, 128)]
