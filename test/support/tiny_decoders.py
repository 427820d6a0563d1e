"""Makes tiny decoders of many kinds by transformers' own configuration classes, and SGLang's models of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sglang_shift.tools.servers import free_port
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

SHAPE = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ALL_HEADS = {"num_key_value_heads": 4}
HEAD = {"head_dim": 16}
QWEN_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0,
}  # fmt: skip
LATENT = {
    **ALL_HEADS, **ROUTED, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 2, "topk_group": 1, "moe_layer_freq": 1, "rope_scaling": YARN,
}  # fmt: skip

DENSE: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "phi3": {}, "qwen2": {}, "qwen3": HEAD, "gemma": HEAD,
    "gemma2": {**HEAD, "hidden_act": "gelu_pytorch_tanh"}, "gemma3_text": HEAD, "olmo2": {}, "olmo3": {}, "granite": {},
    "cohere": {}, "cohere2": {}, "glm4": HEAD, "exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    "smollm3": {}, "stablelm": {}, "arcee": {}, "apertus": {}, "nemotron": {}, "starcoder2": {},
    "phi": {**ALL_HEADS, "intermediate_size": 256}, "persimmon": ALL_HEADS,
}  # fmt: skip
SPARSE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {**QWEN_EXPERTS, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**QWEN_EXPERTS, **HEAD},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, **HEAD},
    "granitemoe": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 8},
    "glm4_moe": {**HEAD, **ROUTED},
    "ernie4_5_moe": {"moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "llama4_text": {
        **HEAD, "intermediate_size_mlp": 128, "num_local_experts": 8, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "minicpm3": {
        **ALL_HEADS, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": {**LATENT, "q_lora_rank": 24, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}  # fmt: skip
DECODERS = DENSE | SPARSE
"""The fields beside :data:`SHAPE`, by the ``model_type`` of transformers."""


def tiny_config(model_type: str) -> Any:
    """Return transformers' configuration of a tiny decoder."""
    config = AutoConfig.for_model(model_type, **{**SHAPE, **DECODERS[model_type]})
    config.architectures = [CLASSES[model_type]]
    return config


def sglang_config(model_type: str) -> Any:
    """Return SGLang's configuration of a tiny decoder in float32."""
    from sglang.srt.configs.model_config import ModelConfig

    config = tiny_config(model_type)
    content = {**config.to_dict(), "architectures": config.architectures, "dtype": "float32"}
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(content, default=str))
        return ModelConfig(folder, trust_remote_code=False, dtype="float32")


def rank_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters. A storage that several parameters share counts once."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def on_first_rank(ranks: int, function: Callable[[], Any]) -> Any:
    """Run a function on each of several forked ranks of stock TP, and return its value on the first rank."""
    context, port = multiprocessing.get_context("fork"), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    children = [
        context.Process(target=_rank, args=(function, sender, port, rank, ranks))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for child in children:
        child.start()
    for _, sender in pipes:
        sender.close()
    values = list(_received(pipes))
    for child in children:
        child.join()
    if failure := next((text for ok, text in values if not ok), None):
        raise AssertionError(failure)
    return values[0][1]


def _received(pipes: list[Any]) -> Iterator[tuple[bool, Any]]:
    for receiver, _ in pipes:
        try:
            yield receiver.recv()
        except EOFError:
            yield False, "a rank ended without a value"


def _rank(function: Callable[[], Any], sender: Any, port: int, rank: int, ranks: int) -> None:
    try:
        _start(port, rank, ranks)
        sender.send((True, function()))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    os._exit(0)  # SGLang's groups would wait for a scheduler's shutdown


def _start(port: int, rank: int, ranks: int) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang_shift.args.server_args import prepare_server_args
    from sglang_shift.launch_server import resolve

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    server_args = prepare_server_args(["--tp-size", str(ranks), "--dtype", "float32"])
    resolve(server_args)
    world_rank = spawn_world_rank(server_args, tp_rank=rank, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=rank))
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(server_args))
