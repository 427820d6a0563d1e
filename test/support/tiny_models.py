"""Tiny random checkpoints of many architectures, with transformers' configuration classes and the real weight names.

transformers builds each model, computes the reference and writes the checkpoint, which SGLang's own loaders then read.
Some published models are not in transformers, but compute what another model in it computes. Their checkpoints get the
published weight names (``names``) and fields (``content``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trial_script

State = dict[str, torch.Tensor]

ABSENT: Any = object()  # a field of transformers that published files do not have
DENSE, EXPERTS, MLA, HYBRID, IMAGES = "dense", "experts", "mla", "hybrid", "images"


@dataclass(frozen=True)
class TinyModel:
    """A tiny model, and what SGLang says about it.

    Attributes:
        architecture: The name in ``config.json``, by which SGLang chooses its class.
        config: Name of the configuration class in transformers.
        group: What kind of model it is.
        fields: Fields of the configuration besides :data:`COMMON`.
        content: Fields of ``config.json`` that transformers does not write, but published checkpoints have.
        names: Changes the names of transformers into those of published checkpoints.
        wrapper: The ``model_type`` of the published multimodal model whose text model this is.
        zeros: Parameters that are zero, because SGLang does not read them.
        dummy: Whether the weights are random numbers that the ranks make up, because transformers has no such model.
        flags: Flags of a server that serves it on a CPU.
        stock: Why stock SGLang 0.5.23 does not serve it in TP of two ranks on a CPU. Empty if it does.
        refused: Why this package does not serve it, in words of the message, although SGLang does.
    """

    architecture: str
    config: str
    group: str = DENSE
    fields: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    names: Callable[[State], State] | None = None
    wrapper: str = ""
    zeros: tuple[str, ...] = ()
    dummy: bool = False
    flags: tuple[str, ...] = ()
    stock: str = ""
    refused: str = ""


# Four ranks divide the heads and the MLP. They do not divide the vocabulary, and 64 does not either.
COMMON: dict[str, Any] = {
    "vocab_size": 331, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # Large weights keep the logits far apart, so that rounding does not change the greedy choice.
    "initializer_range": 0.15,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


YARN = rope(
    "yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
    mscale_all_dim=1.0,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Weight names of published checkpoints whose architecture is another one's in transformers.


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    """Return a function that replaces parts of names, in this order."""

    def rename(state: State) -> State:
        result = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new)  # noqa: PLW2901
            result[name] = tensor
        return result

    return rename


def internlm2(state: State) -> State:
    """Q, K and V are one tensor. In it the heads of a group follow each other: its queries, its key, its value."""
    state = renamed(
        ("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("self_attn", "attention"), ("o_proj", "wo"),
        ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    )(state)  # fmt: skip
    groups, head_dim = COMMON["num_key_value_heads"], COMMON["hidden_size"] // COMMON["num_attention_heads"]
    for name in [name for name in state if "attention.q_proj" in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        grouped = [part.view(groups, -1, head_dim, part.shape[-1]) for part in parts]
        state[name.replace("q_proj", "wqkv")] = torch.cat(grouped, 1).flatten(0, 2).contiguous()
    return state


def fused(state: State, old: tuple[str, ...], new: str) -> State:
    """Concatenate the outputs of several linears into one linear."""
    for name in [name for name in state if old[0] in name]:
        parts = [state.pop(name.replace(old[0], part)) for part in old]
        state[name.replace(old[0], new)] = torch.cat(parts)
    return state


QKV = ("q_proj", "k_proj", "v_proj")


def exaone(state: State) -> State:
    return renamed(
        ("model.", "transformer."), ("layers.", "h."), ("embed_tokens", "wte"),
        ("transformer.norm", "transformer.ln_f"), ("self_attn", "attn.attention"),
        ("o_proj", "out_proj"), ("mlp.gate_proj", "mlp.c_fc_0"),
        ("mlp.up_proj", "mlp.c_fc_1"), ("mlp.down_proj", "mlp.c_proj"),
        ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
    )(state)  # fmt: skip


def qwen1(state: State) -> State:
    state = renamed(
        ("model.", "transformer."), ("layers.", "h."), ("embed_tokens", "wte"),
        ("transformer.norm", "transformer.ln_f"), ("self_attn", "attn"),
        ("o_proj", "c_proj"), ("mlp.gate_proj", "mlp.w2"), ("mlp.up_proj", "mlp.w1"),
        ("mlp.down_proj", "mlp.c_proj"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
    )(state)  # fmt: skip
    return fused(state, QKV, "c_attn")


def baichuan(state: State) -> State:
    return fused(state, QKV, "W_pack")


def chatglm(state: State) -> State:
    state = renamed(
        ("model.embed_tokens", "transformer.embedding.word_embeddings"), ("lm_head", "transformer.output_layer"),
        ("model.norm", "transformer.encoder.final_layernorm"), ("model.layers", "transformer.encoder.layers"),
        ("self_attn", "self_attention"), ("o_proj", "dense"), ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
    )(state)  # fmt: skip
    return fused(state, QKV, "query_key_value")


# ----------------------------------------------------------------------------------------------------------------
# The models.

LLAMA = "LlamaConfig"
WINDOW = {"sliding_window": 32}
MHA = {"num_key_value_heads": 4}
# For models whose K is normed over all heads: SGLang fails if there are more ranks than KV heads.
GQA = {"num_attention_heads": 8, "num_key_value_heads": 4}
HEAD_DIM = {"head_dim": 16}
TIED = {"tie_word_embeddings": True}

# SGLang reads the base of rope under its old name, which transformers does not write, and its default is this.
# It computes the norms of Q and K with this epsilon.
EXAONE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "rms_norm_eps": 1e-6}
DENSE_MODELS = {
    "llama2": TinyModel("LlamaForCausalLM", LLAMA, fields={**MHA, "vocab_size": 320}),
    "llama": TinyModel("LlamaForCausalLM", LLAMA, fields={**TIED, "attention_bias": True}),
    "llama3": TinyModel(
        "LlamaForCausalLM",
        LLAMA,
        fields=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "mistral": TinyModel("MistralForCausalLM", "MistralConfig", fields={"head_dim": 24, "sliding_window": None}),
    "ministral3": TinyModel(
        "Ministral3ForCausalLM",
        "Ministral3Config",
        fields={**HEAD_DIM, "rope_parameters": {**YARN["rope_parameters"], "llama_4_scaling_beta": 0.1}},
        content={"original_max_position_embeddings": 128},
    ),
    "qwen2": TinyModel("Qwen2ForCausalLM", "Qwen2Config"),
    "qwen3": TinyModel("Qwen3ForCausalLM", "Qwen3Config", fields=HEAD_DIM),
    "phi3": TinyModel("Phi3ForCausalLM", "Phi3Config", fields={"vocab_size": 320}),
    "phi4": TinyModel(
        "Phi3ForCausalLM",
        "Phi3Config",
        fields=rope("default", partial_rotary_factor=0.75),
        content={"partial_rotary_factor": 0.75},
    ),
    "gemma": TinyModel(
        "GemmaForCausalLM",
        "GemmaConfig",
        # SGLang computes the exact GELU, whatever the file says. transformers would replace "gelu".
        fields={**HEAD_DIM, **TIED, "hidden_act": "gelu_python"},
    ),
    "gemma2": TinyModel(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        fields={
            **HEAD_DIM,
            **TIED,
            **WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        content={"hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma3": TinyModel(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        fields={**HEAD_DIM, **TIED, **WINDOW, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
    ),
    "olmo": TinyModel("OlmoForCausalLM", "OlmoConfig", fields=MHA),
    "olmo2": TinyModel("Olmo2ForCausalLM", "Olmo2Config", fields=GQA),
    "olmo3": TinyModel(
        "Olmo3ForCausalLM",
        "Olmo3Config",
        fields={**GQA, **WINDOW, "layer_types": ALTERNATING},
        content={"rope_parameters": ABSENT, "rope_theta": 500000.0, "rope_scaling": None},
    ),
    "granite": TinyModel(
        "GraniteForCausalLM",
        "GraniteConfig",
        fields={
            "logits_scaling": 0.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
        },
    ),
    "granite_swa": TinyModel(
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        fields={
            **WINDOW,
            "layer_types": ALTERNATING,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
        },
    ),
    "cohere": TinyModel(
        "CohereForCausalLM", "CohereConfig", fields={**GQA, **TIED, "use_qk_norm": True, "logit_scale": 1.0}
    ),
    "cohere2": TinyModel(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        # SGLang's window has one token more than transformers' window of the same number.
        fields={**TIED, "sliding_window": 33, "layer_types": ALTERNATING, "logit_scale": 1.0},
        content=WINDOW,
    ),
    "glm4": TinyModel("Glm4ForCausalLM", "Glm4Config", fields=HEAD_DIM),
    "exaone4": TinyModel(
        "Exaone4ForCausalLM",
        "Exaone4Config",
        fields={
            **WINDOW,
            **EXAONE,
            "num_hidden_layers": 4,
            "sliding_window_pattern": "LLLG",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "exaone4_full": TinyModel(
        "Exaone4ForCausalLM",
        "Exaone4Config",
        fields={**EXAONE, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "apertus": TinyModel("ApertusForCausalLM", "ApertusConfig"),
    "arcee": TinyModel("ArceeForCausalLM", "ArceeConfig"),
    "starcoder2": TinyModel(
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        fields={"sliding_window": None},
        stock="it takes the global rank for a rank among pipeline stages, so rank 1 has no layers (starcoder2.py:238)",
    ),
    "stablelm": TinyModel("StableLmForCausalLM", "StableLmConfig", fields={"use_qkv_bias": True}),
    "phi": TinyModel(
        "PhiForCausalLM",
        "PhiConfig",
        fields={**MHA, "intermediate_size": 256},
        zeros=("lm_head.bias",),
        stock="it takes the global rank for a rank among pipeline stages, so rank 1 has no layers (phi.py:180)",
    ),
    "persimmon": TinyModel("PersimmonForCausalLM", "PersimmonConfig", fields=MHA),
    "gpt2": TinyModel(
        "GPT2LMHeadModel",
        "GPT2Config",
        fields={"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, **TIED},
        stock="each rank counts the KV heads of all ranks as its own (gpt2.py:79)",
    ),
    "gpt_bigcode": TinyModel(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        fields={"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, **TIED},
    ),
    "gptj": TinyModel(
        "GPTJForCausalLM",
        "GPTJConfig",
        fields={"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
        zeros=("lm_head.bias",),
    ),
    "opt": TinyModel(
        "OPTForCausalLM", "OPTConfig", fields={"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15, **TIED}
    ),
    "hunyuan": TinyModel(
        "HunYuanDenseV1ForCausalLM",
        "HunYuanDenseV1Config",
        fields=HEAD_DIM,
        content={"use_qk_norm": True, "attention_head_dim": 16},
        stock="after its norms Q has a row for each head, of which T are kept (hunyuan.py:345, graph_utils.py:226)",
    ),
    "ernie4_5": TinyModel("Ernie4_5_ForCausalLM", "Ernie4_5Config", fields={**HEAD_DIM, **TIED}),
    "gemma3n": TinyModel(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        fields={
            **HEAD_DIM,
            **TIED,
            **WINDOW,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 331,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "layer_types": [*ALTERNATING, "sliding_attention", "full_attention"],
            "intermediate_size": [96] * 5,
            "activation_sparsity_pattern": [0.0] * 5,
        },
        stock="its logits are not those of transformers with one rank either; the reason was not looked for",
    ),
    "gemma4": TinyModel(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        fields={
            **HEAD_DIM,
            **TIED,
            **WINDOW,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": 331,
            "hidden_size_per_layer_input": 16,
            "global_head_dim": 16,
        },
        content={"global_head_dim": 16},
        stock="it reads fields that transformers does not write (kv_cache_configurator.py:2512)",
    ),
    "hrm_text": TinyModel(
        "HrmTextForCausalLM",
        "HrmTextConfig",
        fields={**HEAD_DIM, **MHA, "num_hidden_layers": 4},
        stock="in transformers a token of the prompt attends to the whole prompt, and in SGLang only to earlier tokens",
    ),
    # These compute what another model of transformers computes, under other names.
    "internlm2": TinyModel("InternLM2ForCausalLM", LLAMA, names=internlm2, content={"bias": False}),
    "internlm3": TinyModel(
        "InternLM3ForCausalLM",
        LLAMA,
        fields={**HEAD_DIM},
        content={"qkv_bias": False, "bias": False},
    ),
    "exaone": TinyModel(
        "ExaoneForCausalLM",
        LLAMA,
        names=exaone,
        content={"model_type": "exaone", "num_layers": 3, "layer_norm_epsilon": 1e-6, "activation_function": "silu"},
    ),
    "xverse": TinyModel("XverseForCausalLM", LLAMA, fields=MHA),
    "orion": TinyModel(
        "OrionForCausalLM",
        "StableLmConfig",
        content={"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        fields={"partial_rotary_factor": 1.0},
    ),
    "teleflm": TinyModel("TeleFLMForCausalLM", LLAMA, content={"use_mup": False}),
    "iquestcoder": TinyModel("IQuestCoderForCausalLM", LLAMA, fields=HEAD_DIM),
    "mimo": TinyModel("MiMoForCausalLM", "Qwen2Config", content={"head_dim": 16}),
    "minicpm": TinyModel(
        "MiniCPMForCausalLM",
        "GraniteConfig",
        fields={
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 3**0.5,
            "logits_scaling": 64 / 256,
            "attention_multiplier": 16**-0.5,
        },
        content={"model_type": "llama", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    ),
    "baichuan": TinyModel(
        "BaichuanForCausalLM",
        LLAMA,
        names=baichuan,
        # SGLang knows the variant with rope by its hidden size.
        fields={
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_hidden_layers": 1,
            "initializer_range": 0.02,
        },
    ),
    "qwen": TinyModel(
        "QWenLMHeadModel",
        "Qwen2Config",
        names=qwen1,
        fields={**MHA, "vocab_size": 320},
        content={
            "intermediate_size": 192,
            "layer_norm_epsilon": 1e-6,
            "kv_channels": 16,
            "rotary_emb_base": 10000,
            "seq_length": 512,
        },
    ),
    "chatglm": TinyModel(
        "ChatGLMModel",
        "GlmConfig",
        names=chatglm,
        fields={**HEAD_DIM, "attention_bias": True},
        content={
            "model_type": "chatglm",
            "num_layers": 3,
            "padded_vocab_size": 331,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "ffn_hidden_size": 96,
            "kv_channels": 16,
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "layernorm_epsilon": 1.5625e-07,
            "rmsnorm": True,
            "post_layer_norm": True,
            "apply_residual_connection_post_layernorm": False,
            "seq_length": 512,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "original_rope": True,
        },
    ),
    "solar": TinyModel(
        "SolarForCausalLM",
        LLAMA,
        # These skip connections add nothing, and without them it is Llama.
        content={"bskcn_1": [0], "bskcn_2": [0], "bskcn_3": [1], "bskcn_4": [2], "bskcn_tv": [0.0, 0.0]},
    ),
    # SGLang has no class for these, and takes transformers' class without a word.
    "smollm3": TinyModel(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        fields={**TIED},
        refused="by transformers' code",
    ),
    "seed_oss": TinyModel(
        "SeedOssForCausalLM",
        "SeedOssConfig",
        fields=HEAD_DIM,
        refused="by transformers' code",
    ),
    "nemotron": TinyModel(
        "NemotronForCausalLM",
        "NemotronConfig",
        stock="it has no class of its own, and transformers' class cannot be divided (transformers.py:765)",
    ),
}

FEW = {"num_experts_per_tok": 2}
DUMMY: dict[str, Any] = {"dummy": True, "flags": ("--load-format", "dummy")}
DUMMY_MODELS = {
    "deepseek": TinyModel(
        "DeepseekForCausalLM",
        LLAMA,
        EXPERTS,
        fields=MHA,
        content={
            **FEW,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "norm_topk_prob": True,
        },
        stock="the experts run in Triton only (deepseek.py:215)",
        **DUMMY,
    ),
    "bailing_moe": TinyModel(
        "BailingMoeForCausalLM",
        LLAMA,
        EXPERTS,
        fields={**MHA, **HEAD_DIM},
        content={
            **FEW,
            "num_experts": 8,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "use_bias": False,
            "use_qkv_bias": False,
            "norm_head": False,
            "embedding_dropout": 0.0,
            "num_nextn_predict_layers": 0,
        },
        **DUMMY,
    ),
    "xverse_moe": TinyModel(
        "XverseMoeForCausalLM",
        LLAMA,
        EXPERTS,
        fields=MHA,
        content={"num_experts": 8, "moe_top_k": 2, "num_shared_experts": 1},
        stock="the experts run in Triton only (xverse_moe.py:181)",
        **DUMMY,
    ),
}

LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
DBRX_ATTENTION = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
DBRX_EXPERTS = {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}
EXPERT_MODELS = {
    "mixtral": TinyModel("MixtralForCausalLM", "MixtralConfig", EXPERTS, fields={**FEW, "num_local_experts": 4}),
    "qwen2_moe": TinyModel(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        EXPERTS,
        fields={**FEW, "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        EXPERTS,
        fields={**FEW, **HEAD_DIM, "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "granitemoe": TinyModel(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        EXPERTS,
        fields={
            **FEW,
            "num_local_experts": 4,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
        },
    ),
    "granitemoeshared": TinyModel(
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        EXPERTS,
        fields={**FEW, "num_local_experts": 4, "shared_intermediate_size": 64, "attention_multiplier": 0.2},
    ),
    "granitemoe_swa": TinyModel(
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSWAConfig",
        EXPERTS,
        fields={
            **FEW,
            **WINDOW,
            "num_local_experts": 4,
            "shared_intermediate_size": 64,
            "attention_multiplier": 0.2,
            "layer_types": ALTERNATING,
        },
    ),
    "glm4_moe": TinyModel(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        EXPERTS,
        fields={
            **FEW,
            **HEAD_DIM,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
            "routed_scaling_factor": 1.5,
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": TinyModel(
        "GptOssForCausalLM",
        "GptOssConfig",
        EXPERTS,
        fields={
            **FEW,
            **WINDOW,
            **HEAD_DIM,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "layer_types": ALTERNATING,
            "swiglu_limit": 1.0,
        },
    ),
    "llama4": TinyModel(
        "Llama4ForConditionalGeneration",
        "Llama4TextConfig",
        EXPERTS,
        wrapper="llama4",
        names=renamed(("model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
        # On a CPU SGLang computes the norms of Q and K in bfloat16, so there are none, as in Llama 4 Maverick. And it
        # drops the result of rope, which only its GPU kernels write in place. So the reference has no rope.
        fields={
            **HEAD_DIM,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 512,
            "use_qk_norm": False,
            "no_rope_layers": [0, 0, 0, 0],
        },
    ),
    "olmoe": TinyModel(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        EXPERTS,
        fields={**FEW, **MHA, "num_experts": 8, "intermediate_size": 32},
        stock="each rank norms its part of Q and K with the weights of all heads (olmoe.py:191)",
    ),
    "phimoe": TinyModel("PhiMoEForCausalLM", "PhimoeConfig", EXPERTS, fields={**FEW, "num_local_experts": 4}),
    "ernie4_5_moe": TinyModel(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        EXPERTS,
        fields={
            **HEAD_DIM,
            **TIED,
            "moe_intermediate_size": 32,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        },
        stock="off GPUs the router adds a bias of two dimensions as if it had one (topk.py:1121)",
    ),
    "dbrx": TinyModel(
        "DbrxForCausalLM",
        "DbrxConfig",
        EXPERTS,
        fields={
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 512,
            "attn_config": DBRX_ATTENTION,
            "ffn_config": {**DBRX_EXPERTS, "hidden_size": 64},
        },
        content={"attn_config": DBRX_ATTENTION, "ffn_config": DBRX_EXPERTS},
        stock="the experts are made on CUDA (dbrx.py:125)",
    ),
    "hunyuan_moe": TinyModel(
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        EXPERTS,
        fields={**HEAD_DIM, "num_experts": 4, "moe_topk": 2},
        content={
            "use_mixed_mlp_moe": True,
            "num_shared_expert": 1,
            "moe_intermediate_size": 96,
            "use_qk_norm": True,
            "attention_head_dim": 16,
        },
        stock="after its norms Q has a row for each head, of which T are kept (hunyuan.py:345, graph_utils.py:226)",
    ),
    "hy_v3": TinyModel(
        "HYV3ForCausalLM",
        "HYV3Config",
        EXPERTS,
        fields={**HEAD_DIM, **FEW, "num_experts": 8, "num_shared_experts": 1, "moe_intermediate_size": 32},
        content={"route_norm": True, "first_k_dense_replace": 1, "qk_norm": True},
    ),
    "afmoe": TinyModel(
        "AfmoeForCausalLM",
        "AfmoeConfig",
        EXPERTS,
        fields={
            **HEAD_DIM,
            **FEW,
            **WINDOW,
            "num_experts": 8,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "num_dense_layers": 1,
            "layer_types": ALTERNATING,
        },
        stock="the experts run in Triton only (afmoe.py:284)",
    ),
    "laguna": TinyModel(
        "LagunaForCausalLM",
        "LagunaConfig",
        EXPERTS,
        fields={
            **HEAD_DIM,
            **FEW,
            **WINDOW,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ALTERNATING,
        },
    ),
    "mellum": TinyModel(
        "MellumForCausalLM",
        "MellumConfig",
        EXPERTS,
        fields={**HEAD_DIM, **FEW, **WINDOW, "num_experts": 8, "moe_intermediate_size": 32, "layer_types": ALTERNATING},
    ),
    "minimax_m2": TinyModel(
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        EXPERTS,
        fields={**HEAD_DIM, **FEW, "num_local_experts": 8, "intermediate_size": 32},
        content={"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "rotary_dim": 16},
        stock="the norms of Q and K run on CUDA only (minimax_m2.py:205)",
    ),
    "exaone_moe": TinyModel(
        "ExaoneMoEForCausalLM",
        "ExaoneMoeConfig",
        EXPERTS,
        fields={
            **FEW,
            "sliding_window": 33,
            **EXAONE,
            "num_hidden_layers": 4,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "num_shared_experts": 1,
            "sliding_window_pattern": "LLLG",
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "first_k_dense_replace": 1,
        },
        content={**WINDOW, "is_moe_layer": [False, True, True, True]},
    ),
    "cohere2_moe": TinyModel(
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        EXPERTS,
        fields={
            **HEAD_DIM,
            **FEW,
            **TIED,
            "sliding_window": 33,
            "num_experts": 8,
            "layer_types": ALTERNATING,
            "logit_scale": 1.0,
            "mlp_layer_types": ["sparse"] * 3,
        },
        content=WINDOW,
    ),
    "glm4_moe_lite": TinyModel(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        MLA,
        fields={
            **FEW,
            **MHA,
            **LATENT,
            "rms_norm_eps": 1e-6,  # transformers computes the norm of the latents with it, whatever the file says
            "q_lora_rank": 32,
            "n_routed_experts": 8,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
        },
        content={"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    ),
}

MLA_MODELS = {
    "deepseek_v2": TinyModel(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        MLA,
        fields={
            **FEW,
            **MHA,
            **LATENT,
            **ROUTED,
            **YARN,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
        content={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        MLA,
        fields={**FEW, **MHA, **LATENT, **ROUTED, **YARN, "q_lora_rank": 32, "n_group": 2, "topk_group": 1},
        content={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "minicpm3": TinyModel(
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        MLA,
        fields={**MHA, **LATENT, "q_lora_rank": 32, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    ),
}

HYBRID_MODELS = {
    "qwen3_next": TinyModel(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        HYBRID,
        fields={
            **FEW,
            "head_dim": 32,
            "num_hidden_layers": 4,
            "num_experts": 8,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        content={"full_attention_interval": 4},
        stock="its recurrent layers need CUDA (qwen3_next.py:252)",
    ),
    "qwen3_5": TinyModel(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        HYBRID,
        fields={
            "head_dim": 32,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        content={"full_attention_interval": 4},
        stock="its recurrent layers run in Triton only (qwen3_next.py)",
    ),
    "falcon_h1": TinyModel(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        HYBRID,
        fields={"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
        stock="its convolution runs on CUDA only (mamba.py:588)",
    ),
    "nemotron_h": TinyModel(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        HYBRID,
        fields={
            **HEAD_DIM,
            "layers_block_type": ["mamba", "moe", "attention", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        content={"layers_block_type": ["mamba", "moe", "attention", "mamba"], "layer_types": ABSENT},
        stock="it does not load the weights that transformers writes (linear.py:805)",
    ),
    "granitemoehybrid": TinyModel(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        HYBRID,
        fields={
            **FEW,
            "num_local_experts": 4,
            "shared_intermediate_size": 64,
            "attention_multiplier": 0.2,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
        },
        stock="its convolution runs on CUDA only (mamba.py:590)",
    ),
    "lfm2": TinyModel(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        HYBRID,
        fields={"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
        stock="its convolution runs in Triton only",
    ),
}


def with_images(text: dict[str, Any], vision: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return fields of a model with a language model and a vision tower."""
    return {"text_config": {**COMMON, **text}, "vision_config": vision, **fields}


def transposed_experts(state: State) -> State:
    """In published files the inputs of an expert come first."""
    return {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts" in name else tensor for name, tensor in state.items()
    }


MROPE = rope("default", mrope_section=[2, 3, 3])
QWEN3_MROPE = rope("default", mrope_section=[4, 2, 2], mrope_interleaved=True)
QWEN_TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
# By default, SGLang interpolates the positions of patches in another way than transformers.
PRECISE = ("--enable-precise-embedding-interpolation",)
QWEN3_TOWER = {**QWEN_TOWER, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
# Trials are text only. The tests of servers also have images.
IMAGE_MODELS = {
    "qwen2_vl": TinyModel(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        IMAGES,
        fields=with_images(MROPE, {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "in_chans": 3}),
    ),
    "qwen2_5_vl": TinyModel(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        IMAGES,
        fields=with_images(MROPE, {**QWEN_TOWER, "window_size": 56, "fullatt_block_indexes": [1]}),
    ),
    "qwen3_vl": TinyModel(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        IMAGES,
        fields=with_images({**QWEN3_MROPE, **HEAD_DIM}, QWEN3_TOWER),
        flags=PRECISE,
    ),
    "qwen3_vl_moe": TinyModel(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        IMAGES,
        fields=with_images(
            {**QWEN3_MROPE, **HEAD_DIM, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            QWEN3_TOWER,
        ),
        names=transposed_experts,
        flags=PRECISE,
    ),
    "gemma3_vl": TinyModel(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        IMAGES,
        fields=with_images(
            {**HEAD_DIM, **TIED, **WINDOW, "query_pre_attn_scalar": 16, "layer_types": ALTERNATING},
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 56,
                "patch_size": 14,
                "vision_use_head": False,
                "hidden_act": "quick_gelu",  # SGLang's tower computes this, whatever the file says
            },
            mm_tokens_per_image=4,
            **TIED,
        ),
        names=renamed(("vision_tower.", "vision_tower.vision_model.")),
        flags=("--enable-multimodal",),
    ),
}

MODELS: dict[str, TinyModel] = {
    **DENSE_MODELS, **EXPERT_MODELS, **DUMMY_MODELS, **MLA_MODELS, **HYBRID_MODELS, **IMAGE_MODELS,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Writing a checkpoint.


def configuration(model: TinyModel) -> Any:
    """Return the configuration in transformers."""
    import transformers

    config_class = getattr(transformers, model.config)
    # Some configurations have other names for the sizes. The record gives these.
    declared = {one.name for one in dataclasses.fields(config_class)}
    common = {name: value for name, value in COMMON.items() if name in declared}
    return config_class(**{**common, **model.fields})


def build(model: TinyModel) -> Any:
    """Return the model in transformers, with random weights that are the same in every process."""
    import transformers

    torch.manual_seed(0)
    of_task = transformers.AutoModelForImageTextToText if model.group == IMAGES else transformers.AutoModelForCausalLM
    built = of_task.from_config(configuration(model), dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in built.named_parameters():
        if name in model.zeros:
            torch.nn.init.zeros_(parameter)
        elif name.endswith("bias"):  # zeros, the default, would hide a bias that is added twice
            torch.nn.init.normal_(parameter, std=0.3)
        elif "alpha_" in name or name.endswith("sinks"):  # SGLang keeps them in bfloat16, whatever the model's dtype is
            parameter.data = parameter.data.bfloat16().to(parameter.dtype if "sinks" in name else torch.bfloat16)
        elif "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif model.group == IMAGES and any(part in name for part in ("vis", "mm_input")):
            torch.nn.init.normal_(parameter, std=0.15)  # the default is smaller, or 0, and would hide the images
    for name, buffer in built.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    return built


@torch.no_grad()
def write(model: TinyModel, folder: str) -> torch.Tensor | None:
    """Write the checkpoint, and return the logits that a trial should have, ``[rows, vocabulary]`` in float32.

    A dummy model has only a ``config.json``, and no logits.
    """
    built = configuration(model) if model.dummy else build(model)
    built.save_pretrained(folder)
    if model.names is not None:
        rename_weights(Path(folder), model.names)
    write_config(model, Path(folder, "config.json"))
    if model.dummy:
        return None

    def logits_of(tokens: list[int]) -> torch.Tensor:
        return built(torch.tensor([tokens]), use_cache=False).logits[0]

    return trial_script.reference(built.config.get_text_config().vocab_size, logits_of)


def write_config(model: TinyModel, file: Path) -> None:
    """Change what transformers wrote into what published checkpoints have."""
    content = {**json.loads(file.read_text()), "architectures": [model.architecture], **model.content}
    content = {name: value for name, value in content.items() if value is not ABSENT}
    if model.wrapper:
        content = {"architectures": [model.architecture], "model_type": model.wrapper, "text_config": content}
    file.write_text(json.dumps(content, indent=1))


def rename_weights(folder: Path, names: Callable[[State], State]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(names(load_file(file)), file, metadata={"format": "pt"})
