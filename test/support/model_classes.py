"""Compares SGLang's model classes with transformers' classes in one process, without a server and a KV pool.

A model takes a fifth of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from sglang.srt.configs.model_config import ModelConfig
from sglang_shift.models.families import FAMILIES, PACKAGE
from sglang_shift.tools.servers import free_port

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A tiny random checkpoint, and how to serve it.

    Attributes:
        architecture: SGLang's name of the model class.
        fields: Fields of its ``config.json`` besides :data:`TINY`.
        tokens: Number of tokens of the prompt.
        context: The value of ``--context-length``.
        override: The value of ``--json-model-override-args``.
        config_class: Name of transformers' configuration class for this checkpoint, if the file does not lead to it.
    """

    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)
    tokens: int = 200
    context: int | None = None
    override: dict[str, Any] = field(default_factory=dict)
    config_class: str | None = None

    def write(self, folder: str) -> dict[str, Any]:
        """Write its ``config.json``, and return the content."""
        model_type = FAMILIES[self.architecture].model_type
        head_dim = {"head_dim": 16} if model_type == "qwen3" else {}
        content = {"architectures": [self.architecture], "model_type": model_type, **TINY, **head_dim, **self.fields}
        Path(folder, "config.json").write_text(json.dumps(content))
        return content

    def model_config(self) -> ModelConfig:
        """Return SGLang's configuration of the checkpoint."""
        with TemporaryDirectory() as folder:
            self.write(folder)
            override = json.dumps(self.override)
            return ModelConfig(
                folder,
                trust_remote_code=False,
                context_length=self.context,
                model_override_args=override,
                dtype="float32",
            )

    def reference(self) -> Any:
        """Return the model in transformers, with random weights."""
        with TemporaryDirectory() as folder:
            content = self.write(folder)
            if self.config_class:
                config = getattr(transformers, self.config_class)(**content)
            else:
                config = transformers.AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model


def in_runtime(function: Callable[[], Any]) -> Any:
    """Return the value of ``function()`` in a forked process, which is a rank. SGLang's layers need a rank."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(function, sender, free_port()))
    child.start()
    sender.close()
    try:
        value = receiver.recv()
    finally:
        child.join()
    if isinstance(value, Failure):
        raise AssertionError(value.text)
    return value


@dataclass
class Failure:
    """The error that a forked process raised."""

    text: str


def _run(function: Callable[[], Any], sender: Any, port: int) -> None:
    try:
        start_runtime(port)
        sender.send(function())
    except BaseException:
        sender.send(Failure(traceback.format_exc()))
    os._exit(0)  # SGLang's groups would wait for a scheduler's shutdown


def start_runtime(port: int) -> None:
    """Prepare this process as a scheduler's process is before it builds its model. Attention needs no KV pool."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang_shift.args.server_args import prepare_server_args
    from sglang_shift.launch_server import resolve

    torch.set_num_threads(1)
    server_args = prepare_server_args(["--tp-size", "1", "--dtype", "float32"])
    resolve(server_args)
    world_rank = spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=0))
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(server_args))
    RadixAttention.forward = attend  # type: ignore[method-assign]


def attend(layer: Any, q: Any, k: Any, v: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
    """Compute causal attention over the one prompt, with all settings of the layer that SGLang's class reads."""
    assert layer.sliding_window_size == -1 and not layer.logit_cap
    heads = [
        x.view(1, len(x), n, -1).transpose(1, 2)
        for x, n in ((q, layer.tp_q_head_num), (k, layer.tp_k_head_num), (v, layer.tp_v_head_num))
    ]
    output = torch.nn.functional.scaled_dot_product_attention(
        *heads, is_causal=True, scale=layer.scaling, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1)


def build(config: Any) -> torch.nn.Module:
    """Return SGLang's model for a configuration, without weights."""
    import importlib

    from sglang.srt.layers.rotary_embedding import factory

    module, _, name = FAMILIES[config.architectures[0]].native.partition(":")
    torch.set_default_dtype(torch.float32)
    factory._ROPE_DICT.clear()  # this cache takes a factor of 4 for a factor of 4.0
    return getattr(importlib.import_module(PACKAGE + module), name)(config=config)


@torch.no_grad()
def difference(case: Case) -> float | str:
    """Return how far SGLang's logprobs are from transformers' logprobs, in nats.

    If SGLang fails, return its error as text. This must run within :func:`in_runtime`.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    reference, length = case.reference(), case.tokens
    ids = torch.tensor([(37 * i) % 500 for i in range(length)])
    expected = reference(ids[None], use_cache=False).logits[0].log_softmax(-1)
    try:
        model = build(case.model_config().hf_config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for parameter in model.parameters():
        parameter.fill_(float("nan"))  # so that a value that the checkpoint lacks is not zero by chance
    model.load_weights(reference.state_dict().items())
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=ids,
        req_pool_indices=torch.zeros(1, dtype=torch.long),
        seq_lens=torch.tensor([length]),
        out_cache_loc=torch.arange(length),
        seq_lens_sum=length,
    )
    hidden = model.model(ids, torch.arange(length), batch)
    logits = hidden @ model.lm_head.weight[: TINY["vocab_size"]].T
    if cap := model.logits_processor.final_logit_softcapping:
        logits = cap * (logits / cap).tanh()
    return float((logits.log_softmax(-1) - expected).abs().max())
