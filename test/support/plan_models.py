"""Makes ``config.json`` files for tests."""

from __future__ import annotations

import json

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def config(folder, **changes):
    content = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file
