"""Fields of a model's ``config.json`` that SGLang's class does not compute as transformers does: refused by name.

SGLang's classes read the fields that they know and pass over the others without a word, so a checkpoint with another
one is served wrongly. What is said here of a field is what the sources of both say, and ``test/test_model_fields.py``
holds it against them: it reads which fields they name, and compares their answers.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from sglang_shift.errors import Refused


@dataclass(frozen=True)
class Architecture:
    """How SGLang and transformers call a model that is served.

    Attributes:
        native: SGLang's class, ``module:name``, in ``sglang.srt.models``.
        model_type: What transformers goes by.
        takes: Fields that SGLang's class takes as transformers does, besides :data:`TAKEN`.
        has: What other models have fields for, and this one has whatever they say.
    """

    native: str
    model_type: str
    takes: tuple[str, ...] = ()
    has: tuple[str, ...] = ()


PACKAGE = "sglang.srt.models."
_LENGTH = "original_max_position_embeddings"

# Dense decoders on SGLang's layer boundaries whose every mode is tested against transformers.
MODELS = {
    "LlamaForCausalLM": Architecture("llama:LlamaForCausalLM", "llama", ("attention_bias", _LENGTH)),
    "MistralForCausalLM": Architecture("mistral:MistralForCausalLM", "mistral", (_LENGTH,)),
    "Phi3ForCausalLM": Architecture("llama:Phi3ForCausalLM", "phi3", (_LENGTH, "partial_rotary_factor")),
    "Qwen2ForCausalLM": Architecture("qwen2:Qwen2ForCausalLM", "qwen2", has=("attention_bias", "qkv_bias")),
    "Qwen3ForCausalLM": Architecture("qwen3:Qwen3ForCausalLM", "qwen3", ("attention_bias",), ("qk_norm", "use_qk_norm")),
}

TAKEN = frozenset(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "dtype")
)  # fmt: skip
"""What every class takes as transformers does."""

HARMLESS = frozenset(
    ("transformers_version", "architectures", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
     "id2label", "label2id", "problem_type", "initializer_range", "use_cache", "pad_token_id", "bos_token_id",
     "eos_token_id", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop")
)  # fmt: skip
"""What no answer depends on: names, training, token ids, and how the same sums are divided."""

ROPE = frozenset(("rope_parameters", _LENGTH))
WINDOW = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))

# Other models' fields that change what is computed, and what they are where they change nothing (as null does). None
# of the classes above has them in transformers; SGLang's ignore them, or read them where transformers does not.
FOREIGN: dict[str, Any] = {
    **dict.fromkeys(
        ("attention_bias", "bias", "mlp_bias", "qkv_bias", "use_bias", "lm_head_bias", "attention_out_bias",
         "use_qk_norm", "qk_norm", "qk_layernorm", "use_bidirectional_attention", "use_parallel_residual", "alibi",
         "rope_interleaved", "rope_interleave", "scale_attn_by_inverse_layer_idx", "attn_temperature_tuning",
         "attention_sink_bias", "learnable_sink", "is_hybrid_swa", "use_ngram_embedding"), False
    ),
    **dict.fromkeys(("is_causal", "rope_is_neox_style", "use_rope"), True),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier", "lm_head_multiplier",
         "scale_emb", "embedding_scale", "partial_rotary_factor", "rotary_pct", "loop_num", "num_loops", "hc_mult"), 1
    ),
    **dict.fromkeys(
        ("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base", "attn_logit_softcapping",
         "final_logit_softcapping", "clip_qkv", "no_rope_layers", "no_rope_layer_interval", "rotary_dim",
         "layer_rope_theta", "rope_local_base_freq", "attention_chunk_size", "sliding_window_pattern",
         "dual_chunk_attention_config", "original_num_attention_heads", "linear_attn_config", "engram_layer_ids",
         "hidden_activation"), None
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 0),
}  # fmt: skip

# Keys of the rope's parameters that both compute alike, by type. Some need a second look: see `_rope_problem`.
ROPE_KEYS: dict[str, frozenset[str]] = {
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
    "yarn": frozenset(
        ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate")
    ),
    "longrope": frozenset(
        ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor")
    ),
}  # fmt: skip
# "default" is what is left when another type is switched off, with all of its keys.
ROPE_KEYS["default"] = frozenset().union(*ROPE_KEYS.values())
ANY_ROPE_KEYS = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"))


def check_fields(hf_config: Any, context_len: int) -> None:
    """Check that SGLang's class computes what the model's configuration says, up to the context.

    Args:
        hf_config: Its Hugging Face configuration, whose architecture is in :data:`MODELS`.
        context_len: The longest sequence that is served.

    Raises:
        Refused: with the field, and the way out if there is one.
    """
    name = hf_config.architectures[0]
    model = MODELS[name]
    if hf_config.model_type != model.model_type:
        raise Refused(
            f"config.json has architecture {name} and model_type {hf_config.model_type!r}, and SGLang would compute "
            f"the former where transformers computes the latter; make them agree (model_type {model.model_type!r})"
        )
    if getattr(hf_config, "is_heterogeneous", False):
        raise Refused(f"config.json has per_layer_config, which SGLang's {name} does not read; serve another checkpoint")
    for field, without in _neutral(model).items():
        value = getattr(hf_config, field, None)
        if value not in (None, [], without):
            raise Refused(
                f"config.json has {field} {_short(value)}, with which SGLang's {name} would answer wrongly, without "
                f"an error; if the weights do without it, remove it or give {_override(field, without)}"
            )
    if problem := _rope_problem(hf_config, model, context_len):
        raise Refused(f"config.json has {problem}")
    if problem := _window_problem(hf_config, model, context_len):
        raise Refused(f"config.json has {problem}")


def check_class(model: Any, name: str) -> None:
    """Check that SGLang loaded its own class for the architecture.

    It falls back to transformers' code, silently, for a name that it lacks or whose module it cannot import, and a
    package of the user's may register a class of that name.

    Args:
        model: The loaded model.
        name: The architecture, which is in :data:`MODELS`.

    Raises:
        Refused: it is another class.
    """
    found = type(model)
    loaded, native = f"{found.__module__}:{found.__qualname__}", PACKAGE + MODELS[name].native
    if loaded != native:
        raise Refused(
            f"SGLang loaded {loaded} for architecture {name}, and sequence parallelism is tested with {native}; remove "
            "what replaces it (SGLANG_EXTERNAL_MODEL_PACKAGE, SGLANG_DISABLED_MODEL_ARCHS), or serve without sequence "
            "parallelism"
        )


def _neutral(model: Architecture) -> dict[str, Any]:
    """The fields that must change nothing, and the values with which they do not."""
    from transformers import CONFIG_MAPPING

    known = {field.name: _default(field) for field in fields(CONFIG_MAPPING[model.model_type])}
    foreign = {field: field in model.has or value for field, value in FOREIGN.items() if field not in known}
    served = TAKEN | HARMLESS | ROPE | WINDOW | set(model.takes)
    return {field: value for field, value in (foreign | known).items() if field not in served}


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _window_problem(hf_config: Any, model: Architecture, context_len: int) -> str | None:
    """None of the classes has a window: it must be longer than anything that is served."""
    name, kinds = hf_config.architectures[0], getattr(hf_config, "layer_types", None) or []
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return f"layers of type {', '.join(others)}, which SGLang's {name} does not have; serve another checkpoint"
    window = getattr(hf_config, "sliding_window", None)
    # Qwen has it in the layers that slide, the others in all.
    slides = "sliding_attention" in kinds or not model.model_type.startswith("qwen")
    if not slides or (window is not None and context_len <= window):
        return None
    if window is None:
        return "sliding_attention layers, and no sliding_window" if kinds else None
    return (
        f"sliding_window {window}, which SGLang's {name} does not have: beyond it the context of {context_len} tokens "
        f"would be answered wrongly, without an error; give --context-length {window} or less"
    )


def _rope_problem(hf_config: Any, model: Architecture, context_len: int) -> str | None:
    """What the two compute differently of the positions."""
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        return f"rope parameters by type of layer ({', '.join(nested)}), which SGLang does not read; give one for all"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "dynamic":
        context = hf_config.max_position_embeddings
        return (
            "rope type 'dynamic', which SGLang scales for the longest sequence at every length; "
            f"{_override('rope_scaling', {'rope_type': 'default', 'type': 'default'})} with --context-length {context} "
            "or less is the same without"
        )
    if kind not in ROPE_KEYS:
        return f"rope type {kind!r}, which is not served; these are: {', '.join(sorted(ROPE_KEYS))}"
    if kind == "default" and rope.get("type", kind) != kind:
        return f"rope_type 'default' and type {rope['type']!r}, and SGLang goes by the former; give both alike"
    for key in sorted(rope.keys() - ROPE_KEYS[kind] - ANY_ROPE_KEYS):
        if rope[key] is not None:
            return f"{key} {_short(rope[key])} for rope type {kind!r}, which SGLang and transformers do not read alike"
    # SGLang's Phi-3 has it beside the rope's parameters, transformers' among them; the others have neither.
    beside = (getattr(hf_config, "partial_rotary_factor", None) if "partial_rotary_factor" in model.takes else None) or 1
    if (among := rope.get("partial_rotary_factor") or beside) != beside:
        return (
            f"partial_rotary_factor {among} among the rope's parameters, where SGLang does not read it; "
            f"give {_override('partial_rotary_factor', among)} as well"
            if "partial_rotary_factor" in model.takes
            else f"partial_rotary_factor {among}, which SGLang does not read; serve another checkpoint"
        )
    if kind == "default":
        return None
    return _scaling_problem(hf_config, model, kind, rope, context_len)


def _scaling_problem(
    hf_config: Any, model: Architecture, kind: str, rope: dict[str, Any], context_len: int
) -> str | None:
    """The numbers of a rope type that both have, where they do different things with them."""
    factor, length, beside = rope.get("factor"), rope.get(_LENGTH), getattr(hf_config, _LENGTH, None)
    if _LENGTH in model.takes or length is None:
        length = beside or length or hf_config.max_position_embeddings
    elif kind != "linear" and beside not in (None, length):
        return f"{_LENGTH} {beside}, and {length} among the rope's parameters, which SGLang takes; make them agree"
    if kind == "linear" and not isinstance(factor, float):
        return (
            f"factor {factor!r} for rope type 'linear', with which SGLang fails; "
            f"give a number with a point: {_override('rope_scaling', {'factor': float(factor or 1)})}"
        )
    if kind == "yarn":
        scale = _yarn_scale(factor)
        mscales = [rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key) is not None]
        if factor is None or any(key in rope and not rope[key] for key in ("beta_fast", "beta_slow")):
            return "factor, beta_fast or beta_slow null or 0 for rope type 'yarn', with which SGLang fails; give numbers"
        if len(mscales) == 2:
            if not all(mscales):
                return "mscale or mscale_all_dim 0 for rope type 'yarn', which SGLang and transformers read differently"
            scale = _yarn_scale(factor, mscales[0]) / _yarn_scale(factor, mscales[1])
        return _attention_factor_problem(rope, kind, scale)
    if kind == "longrope":
        ratio = hf_config.max_position_embeddings / length
        if factor is not None and not math.isclose(factor, ratio):
            return (
                f"factor {factor} for rope type 'longrope', of which SGLang takes max_position_embeddings / "
                f"original_max_position_embeddings, here {ratio:g}; make them agree"
            )
        scale = math.sqrt(1 + math.log(ratio) / math.log(length)) if ratio > 1 else 1.0
        if problem := _attention_factor_problem(rope, kind, scale):
            return problem
        if context_len > length:
            return (
                f"rope type 'longrope', of which SGLang takes the long factors for a whole batch as soon as one of its "
                f"tokens is beyond {length}, so that answers would depend on other requests; give --context-length "
                f"{length} or less"
            )
    return None


def _attention_factor_problem(rope: dict[str, Any], kind: str, computed: float) -> str | None:
    given = rope.get("attention_factor")
    if given is None or math.isclose(given, computed, rel_tol=1e-6):
        return None
    return f"attention_factor {given} for rope type {kind!r}, where SGLang always takes {computed:.6g}; remove it"


def _yarn_scale(factor: float | None, mscale: float = 1.0) -> float:
    return 1.0 if factor is None or factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _override(field: str, value: Any) -> str:
    return f"--json-model-override-args '{json.dumps({field: value})}'"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
