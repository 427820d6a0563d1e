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


def _config(model_type, architecture, *sizes, **fields):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "architectures": [architecture], "model_type": model_type, **dict(zip(names, sizes, strict=True)),
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False, **fields,
    }  # fmt: skip


KNOWN = {
    "Llama-3.1-70B": _config("llama", "LlamaForCausalLM", 8192, 28672, 80, 64, 8, vocab_size=128_256),
    "Mixtral-8x7B": _config(
        "mixtral", "MixtralForCausalLM", 4096, 14336, 32, 32, 8, vocab_size=32_000, num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe", "Qwen3MoeForCausalLM", 2048, 6144, 48, 32, 4, vocab_size=151_936, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "DeepSeek-V3": _config(
        "deepseek_v3", "DeepseekV3ForCausalLM", 7168, 18432, 61, 128, 128, vocab_size=129_280, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
        moe_layer_freq=1, q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, num_nextn_predict_layers=1,
    ),
    "gpt-oss-20b": _config(
        "gpt_oss", "GptOssForCausalLM", 2880, 2880, 24, 64, 8, vocab_size=201_088, head_dim=64, num_local_experts=32,
        num_experts_per_tok=4, attention_bias=True, sliding_window=128,
    ),
}  # fmt: skip
"""Fields of the ``config.json`` of known models. Their contexts are cut, which changes no size."""

PUBLISHED = {
    "Llama-3.1-70B": (70.6e9, 70.6e9),  # https://arxiv.org/abs/2407.21783 says 70B; 70.6B is the count of its weights
    "Mixtral-8x7B": (46.7e9, 12.9e9),  # https://mistral.ai/news/mixtral-of-experts
    "Qwen3-30B-A3B": (30.5e9, 3.3e9),  # https://arxiv.org/abs/2505.09388 and the model's card
    "DeepSeek-V3": (671e9, 37e9),  # https://arxiv.org/abs/2412.19437
    "gpt-oss-20b": (20.9e9, 3.6e9),  # https://arxiv.org/abs/2508.10925, table 1
}
"""Published numbers of weights, and of those that compute a token."""


def known_config(folder, name, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(KNOWN[name] | changes))
    return file
