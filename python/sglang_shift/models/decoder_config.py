"""Reads the description of a decoder from the fields of its configuration. Field names differ between models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sglang_shift.models.decoder import Decoder, Experts, Latent, Traits
from sglang_shift.models.decoder_layer import EXPERTS, Layer, size_in

NESTED_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Fields in which models of more than text keep the configuration of their language model."""

HIDDEN = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "kv_channels")
VOCABULARY = ("vocab_size", "padded_vocab_size")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
DENSE_INTERMEDIATE = ("intermediate_size_mlp",)
COUNTS = (*EXPERTS, "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "experts_per_token")
EXPERT_INTERMEDIATE = ("moe_intermediate_size", "expert_ffn_hidden_size")
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_INTERMEDIATE = ("shared_expert_intermediate_size", "shared_intermediate_size")

MOST_LAYERS = 10_000
"""More layers than any model has. Each layer of a mixture of experts is asked for its kind."""

BIASED = Traits(qkv_bias=True)
BY_FIELD = Traits(qkv_bias="attention_bias", output_bias="attention_bias")
PLAIN = Traits()
UNGATED = Traits(gated=False)
GEMMA_3 = replace(BY_FIELD, norms=4, qk_norm=True, whole_embedding=True)

TRAITS = {
    # Dense models.
    "LlamaForCausalLM": BY_FIELD,
    "MistralForCausalLM": PLAIN,
    "Phi3ForCausalLM": PLAIN,
    "Qwen2ForCausalLM": BIASED,
    "Qwen3ForCausalLM": replace(BY_FIELD, qk_norm=True),
    "GemmaForCausalLM": BY_FIELD,
    "Gemma2ForCausalLM": replace(BY_FIELD, norms=4),
    "Gemma3ForCausalLM": GEMMA_3,
    "Gemma3ForConditionalGeneration": GEMMA_3,
    "Olmo2ForCausalLM": replace(BY_FIELD, qk_norm=True),
    "Olmo3ForCausalLM": replace(BY_FIELD, qk_norm=True),
    "GraniteForCausalLM": BY_FIELD,
    "CohereForCausalLM": replace(BY_FIELD, norms=1),
    "Cohere2ForCausalLM": replace(BY_FIELD, norms=1),
    "Glm4ForCausalLM": Traits(qkv_bias="attention_bias", norms=4),
    "Exaone4ForCausalLM": Traits(qk_norm=True),
    "SmolLM3ForCausalLM": BY_FIELD,
    "StableLmForCausalLM": Traits(qkv_bias="use_qkv_bias"),
    "ArceeForCausalLM": replace(BY_FIELD, gated=False),
    "ApertusForCausalLM": replace(BY_FIELD, gated=False, qk_norm=True),
    "NemotronForCausalLM": replace(BY_FIELD, gated=False),
    "Starcoder2ForCausalLM": Traits(gated=False, qkv_bias="use_bias", output_bias="use_bias"),
    "PhiForCausalLM": Traits(gated=False, qkv_bias=True, output_bias=True, norms=1),
    "PersimmonForCausalLM": Traits(gated=False, qkv_bias=True, output_bias=True),
    # Mixtures of experts.
    "MixtralForCausalLM": PLAIN,
    "Qwen2MoeForCausalLM": BIASED,
    "Qwen3MoeForCausalLM": replace(BY_FIELD, qk_norm=True),
    "GptOssForCausalLM": BY_FIELD,
    "GraniteMoeForCausalLM": BY_FIELD,
    "OlmoeForCausalLM": replace(BY_FIELD, qk_norm=True),
    "PhiMoEForCausalLM": BY_FIELD,
    "Glm4MoeForCausalLM": Traits(qkv_bias="attention_bias", qk_norm=True),
    "Ernie4_5_MoeForCausalLM": PLAIN,
    "Llama4ForCausalLM": replace(BY_FIELD, shared_experts=1),
    "Llama4ForConditionalGeneration": replace(BY_FIELD, shared_experts=1),
    # Latent attention.
    "DeepseekV2ForCausalLM": PLAIN,
    "DeepseekV3ForCausalLM": PLAIN,
    "MiniCPM3ForCausalLM": PLAIN,
    # Older models, by their names for a gateless MLP.
    **dict.fromkeys(
        ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM",
         "FalconForCausalLM"), UNGATED
    ),
}  # fmt: skip
"""Traits by architecture. Tests compare each with transformers' class. Other models are taken for plain ones."""

VISION_CONFIGS = ("vision_config", "audio_config", "encoder_config")
VISION_LAYERS = ("num_hidden_layers", "depth", "layers", "num_layers")
VISION_HIDDEN = ("hidden_size", "embed_dim", "width", "d_model")


def architecture_of(config: Any) -> str:
    """Return the name of the class of a configuration, or an empty text."""
    return (getattr(config, "architectures", None) or [""])[0]


def text_config_of(config: Any) -> Any:
    """Return the configuration of the language model inside a configuration of more than text."""
    for name in NESTED_CONFIGS:
        if (nested := getattr(config, name, None)) is not None and not isinstance(nested, dict):
            return text_config_of(nested)
    return config


def outline_of(config: Any) -> Decoder:
    """Return what the fields say of the embedding and the attention. The description has no MLP.

    Args:
        config: A Hugging Face configuration.

    Raises:
        KeyError: a field is missing.
        ValueError: a field has a value that is no size.
    """
    name, text = architecture_of(config), text_config_of(config)
    traits = TRAITS.get(name, PLAIN)
    hidden, heads = _size(text, HIDDEN), _size(text, HEADS)
    latent = _latent(text)
    kv_heads = heads if latent else _size(text, KV_HEADS, heads)
    head_dim = latent.head if latent else _size(text, HEAD_DIM, hidden // heads)
    if heads % kv_heads:
        raise ValueError(f"{_field(text, KV_HEADS)[0]} {kv_heads} does not divide {_field(text, HEADS)[0]} {heads}")
    layers = _size(text, LAYERS, least=0)
    return Decoder(
        layer=Layer(hidden, 0, heads, kv_heads, head_dim),
        layers=layers,
        vocabulary=_size(text, VOCABULARY),
        tied_embeddings=bool(getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", False))),
        latent=latent,
        gated=traits.gated,
        qk_norm=traits.qk_norm and getattr(text, "use_qk_norm", True) is not False,
        qkv_bias=_is_true(text, traits.qkv_bias),
        output_bias=_is_true(text, traits.output_bias),
        norms=traits.norms,
        whole_embedding=traits.whole_embedding,
        cached_layers=_count(text, layers, lambda kind: "linear" not in kind and "attention" in kind),
        windowed_layers=_count(text, layers, lambda kind: "sliding" in kind or "chunked" in kind) or 0,
        vision=_vision(config),
    )


def decoder_of(config: Any) -> Decoder:
    """Return the description of the decoder of a Hugging Face configuration.

    Raises:
        KeyError: a field is missing.
        ValueError: a field has a value that is no size.
    """
    outline, text = outline_of(config), text_config_of(config)
    experts = _experts(text, TRAITS.get(architecture_of(config), PLAIN), outline.layers)
    if experts and experts.layers == outline.layers:
        intermediate = experts.intermediate  # no layer has a dense MLP, whatever the field says
    elif getattr(text, "model_type", None) == "gpt2":
        intermediate = _size(text, INTERMEDIATE, 4 * outline.layer.hidden)
    else:
        intermediate = _size(text, (*DENSE_INTERMEDIATE, *INTERMEDIATE), least=0)
    return replace(outline, layer=replace(outline.layer, intermediate=intermediate), experts=experts)


def expert_count(config: Any) -> int:
    """Return the number of routed experts of a layer, or 0."""
    text = text_config_of(config)
    return next((n for name in COUNTS if isinstance(n := getattr(text, name, None), int) and n > 0), 0)


def _field(config: Any, names: Sequence[str]) -> tuple[str, Any]:
    """Return the first of the names that the configuration has a value for, and the value."""
    found = ((name, getattr(config, name, None)) for name in names)
    return next(((name, value) for name, value in found if value is not None), (names[0], None))


def _size(config: Any, names: Sequence[str], default: int | None = None, least: int = 1) -> int:
    name, value = _field(config, names)
    return size_in({name: value}, name, default, least)


def _is_true(config: Any, trait: bool | str) -> bool:
    return trait if isinstance(trait, bool) else bool(getattr(config, trait, False))


def _latent(config: Any) -> Latent | None:
    if getattr(config, "kv_lora_rank", None) is None:
        return None
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    rank, rope, nope, value = (_size(config, (name,)) for name in names)
    query_rank = getattr(config, "q_lora_rank", None)
    return Latent(_size(config, ("q_lora_rank",)) if query_rank else None, rank, rope, nope, value)


def _experts(config: Any, traits: Traits, layers: int) -> Experts | None:
    count = expert_count(config)
    if not count:
        return None
    if _field(config, PER_TOKEN)[1] is None:
        raise ValueError(f"{count} experts, and no {PER_TOKEN[0]}")
    intermediate = _size(config, (*EXPERT_INTERMEDIATE, *INTERMEDIATE))
    shared = _size(config, SHARED_INTERMEDIATE, 0, least=0) or intermediate * (
        _size(config, SHARED_COUNTS, traits.shared_experts, least=0)
    )
    return Experts(count, _size(config, PER_TOKEN), intermediate, _sparse_layers(config, layers), shared)


def _sparse_layers(config: Any, layers: int) -> int:
    """Return the number of layers that have experts. Each family of models has its own fields for that."""
    if layers > MOST_LAYERS:
        raise ValueError(f"{layers} layers with experts, more than {MOST_LAYERS}")
    if (listed := getattr(config, "moe_layers", None)) is not None:  # Llama 4
        return len(listed)
    if (kinds := getattr(config, "mlp_layer_types", None)) is not None:
        return sum(kind == "sparse" for kind in kinds[:layers])
    return sum(_is_sparse(config, index, layers) for index in range(layers))


def _is_sparse(config: Any, index: int, layers: int) -> bool:
    """Whether a layer has experts: by the fields of DeepSeek and GLM, Qwen, Llama 4 and ERNIE."""
    frequency = getattr(config, "moe_layer_freq", None) or 1
    if isinstance(frequency, list):
        return bool(frequency[index])
    last = getattr(config, "moe_layer_end_index", None)
    return (
        index >= (getattr(config, "first_k_dense_replace", None) or 0)
        and index % frequency == 0
        and index not in (getattr(config, "mlp_only_layers", None) or ())
        and (index + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
        and (index + 1) % (getattr(config, "interleave_moe_layer_step", None) or 1) == 0
        and index >= (getattr(config, "moe_layer_start_index", None) or 0)
        and (last is None or last < 0 or index <= last)
        and (index + 1) % (getattr(config, "moe_layer_interval", None) or 1) == 0
    )


def _count(config: Any, layers: int, applies: Callable[[str], bool]) -> int | None:
    """Return the number of layers of some kinds; None if the configuration does not name the kind of each layer.

    A recurrent layer has a state instead of a KV cache. The state is not counted.
    """
    kinds = getattr(config, "layer_types", None)
    if not isinstance(kinds, list) or len(kinds) != layers:
        return None
    return sum(applies(str(kind)) for kind in kinds)


def _vision(config: Any) -> int:
    """Return about how many weights the encoders of images and sound have: attention and a plain MLP in each layer."""
    total = 0
    for name in VISION_CONFIGS:
        encoder = getattr(config, name, None)
        if encoder is None or isinstance(encoder, dict):
            continue
        layers, hidden = _size(encoder, VISION_LAYERS, 0, least=0), _size(encoder, VISION_HIDDEN, 0, least=0)
        intermediate = _size(encoder, INTERMEDIATE, 4 * hidden, least=0)
        matrices = 3 if getattr(encoder, "hidden_act", None) == "silu" else 2
        total += layers * (4 * hidden * hidden + matrices * hidden * intermediate)
    return total
