"""What the CPU platform sets, and what it puts in place when SGLang imports its model runner."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
from sglang.srt.platforms.interface import PlatformCapabilities
from sglang_shift.platforms import cpu, fallbacks
from sglang_shift.platforms.attention_backend import CpuAttentionBackend
from sglang_shift.seams.registry import replacement_by, resolve


def defaults(platform=None, **given):
    """The server arguments after the platform has set its defaults."""
    args = SimpleNamespace(
        **{
            "attention_backend": None,
            "moe_runner_backend": "auto",
            "lora_backend": "csgmv",
            "cuda_graph_config": CudaGraphConfig(),
            "max_total_tokens": 100,
            "dp_size": 1,
            "tp_size": 1,
            "pp_size": 1,
            "nnodes": 1,
            "speculative_algorithm": None,
            "speculative_adaptive": False,
            **dict.fromkeys(cpu.CHAIN),
            **given,
        }
    )
    (platform or cpu.ShiftCpuPlatform()).apply_server_args_defaults(args)
    return args


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setattr(cpu.os, "environ", dict(cpu.os.environ))


@pytest.mark.parametrize("before", [None, "intel_amx"])
def test_our_attention_is_the_default(before):
    """SGLang may have set the backend of its CPU engine before it asks the platform."""
    assert defaults(attention_backend=before).attention_backend == cpu.ATTENTION


def test_torch_native_stays_what_it_is():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    assert defaults(attention_backend="torch_native").attention_backend == "torch_native"
    assert ATTENTION_BACKENDS["torch_native"].__module__ == "sglang.srt.layers.attention.attention_registry"


def test_there_are_no_graphs_unless_the_platform_captures():
    config = defaults().cuda_graph_config
    assert (config.decode.backend, config.prefill.backend) == ("disabled", "disabled")
    platform = cpu.ShiftCpuPlatform()
    platform.capabilities = PlatformCapabilities(graph_capture=True)
    assert defaults(platform).cuda_graph_config == CudaGraphConfig()


def test_a_runner_of_experts_that_the_user_chose_stays():
    assert defaults().moe_runner_backend == "triton"
    assert defaults(moe_runner_backend="cutlass").moe_runner_backend == "cutlass"


def chain(**given):
    args = defaults(**given)
    return [getattr(args, name) for name in cpu.CHAIN]


def test_draft_models_propose_no_trees_by_default():
    """For a Llama, SGLang chooses four drafts for each draft of the step before."""
    assert chain(speculative_algorithm="eagle3") == chain(speculative_algorithm="EAGLE") == [3, 1, 4]
    assert chain() == chain(speculative_algorithm="NGRAM") == [None, None, None]
    assert chain(speculative_algorithm="EAGLE", speculative_num_steps=5) == [5, None, None]
    assert chain(speculative_algorithm="EAGLE", speculative_adaptive=True) == [None, None, None]


def test_mla_caches_latents():
    config = SimpleNamespace(
        attention_arch=AttentionArch.MHA, get_total_num_kv_heads=lambda: 8, head_dim=64, kv_lora_rank=None
    )
    assert cpu.kv_width(config, tp_size=4) == 2 * 2 * 64
    latents = SimpleNamespace(attention_arch=AttentionArch.MLA, kv_lora_rank=512, qk_rope_head_dim=64)
    assert cpu.kv_width(latents, tp_size=4) == 512 + 64


@pytest.mark.skipif(torch.accelerator.is_available(), reason="SGLang uses its own platform")
def test_a_stock_server_gets_all_of_it():
    """Stock servers import the model runner, and no other part of this package."""
    import sglang.srt.model_executor.model_runner  # noqa: F401
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    runner = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=None)
    assert isinstance(ATTENTION_BACKENDS[cpu.ATTENTION](runner), CpuAttentionBackend)
    for name in (cpu.ATTENTION, "torch_native"):
        assert AttentionBackendRegistry.get_handler(name) is fallbacks.absorbed
    replacements = (
        cpu.keep_config,
        fallbacks.cap_logits,
        fallbacks.experts,
        fallbacks.gate_shared_expert,
        fallbacks.last_slots,
        fallbacks.rope_of_mla,
    )
    for function in replacements:
        assert resolve(replacement_by(function).target) is function
