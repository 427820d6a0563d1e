"""Fields of a model's ``config.json`` that SGLang's class does not compute as transformers does: refused by name.

SGLang's classes read the fields that they know and pass over the others without a word, so a checkpoint with another
one is served wrongly. What is said here of a field is what the sources of both say, and ``test/test_model_fields.py``
holds it against them: it reads which fields they name, and compares their answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import chain
from typing import Any

from sglang_shift.errors import Refusal
from sglang_shift.models.rope_fields import LENGTH, PARTIAL, override, rope_problems, short


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

# Dense decoders on SGLang's layer boundaries whose every mode is tested against transformers.
MODELS = {
    "LlamaForCausalLM": Architecture("llama:LlamaForCausalLM", "llama", ("attention_bias", LENGTH)),
    "MistralForCausalLM": Architecture("mistral:MistralForCausalLM", "mistral", (LENGTH,)),
    "Phi3ForCausalLM": Architecture("llama:Phi3ForCausalLM", "phi3", (LENGTH, PARTIAL)),
    "Qwen2ForCausalLM": Architecture("qwen2:Qwen2ForCausalLM", "qwen2", has=("attention_bias", "qkv_bias")),
    "Qwen3ForCausalLM": Architecture("qwen3:Qwen3ForCausalLM", "qwen3", ("attention_bias",), ("use_qk_norm",)),
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

ROPE = frozenset(("rope_parameters", LENGTH))
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


FIELD = Refusal(
    "config.json has {problem}",
    "SGLang's class does not compute what the field says, so its answers would be wrong. The message has the field, "
    "and the way out if there is one: [Fields of config.json](usage.md#fields-of-configjson).",
)
OTHER_CLASS = Refusal(
    "SGLang loaded {other_class} for architecture {name}, and sequence parallelism is tested with {native_class}; "
    "remove what replaces it (SGLANG_EXTERNAL_MODEL_PACKAGE, SGLANG_DISABLED_MODEL_ARCHS), or serve without sequence "
    "parallelism",
    "A rank checks this after loading. SGLang takes transformers' code for a class that it cannot import, and a "
    "package of the user's may replace a class.",
)


def check_fields(hf_config: Any, context_len: int) -> None:
    """Check that SGLang's class computes what the model's configuration says, up to the context.

    Args:
        hf_config: Its Hugging Face configuration, whose architecture is in :data:`MODELS`.
        context_len: The longest sequence that is served.

    Raises:
        Refused: with the field, and the way out if there is one.
    """
    model = MODELS[hf_config.architectures[0]]
    for problem in chain(
        _field_problems(hf_config, model),
        rope_problems(hf_config, model.takes, context_len),
        _window_problems(hf_config, model, context_len),
    ):
        raise FIELD(problem=problem)


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
        raise OTHER_CLASS(other_class=loaded, name=name, native_class=native)


def _field_problems(hf_config: Any, model: Architecture) -> Iterator[str]:
    name = hf_config.architectures[0]
    if hf_config.model_type != model.model_type:
        yield (
            f"architecture {name} and model_type {hf_config.model_type!r}, and SGLang would compute the former where "
            "transformers computes the latter; if the weights are the former's, give "
            f"{override('model_type', model.model_type)}"
        )
    if getattr(hf_config, "is_heterogeneous", False):
        yield f"per_layer_config, which SGLang's {name} does not read; serve another checkpoint"
    for field, without in _neutral(model).items():
        value = getattr(hf_config, field, None)
        if value not in (None, [], without):
            yield (
                f"{field} {short(value)}, with which SGLang's {name} would answer wrongly, without an error; if the "
                f"weights do without it, remove it or give {override(field, without)}"
            )


def _neutral(model: Architecture) -> dict[str, Any]:
    """The fields that must change nothing, and the values with which they do not."""
    known = _known(model)
    foreign = {field: field in model.has or value for field, value in FOREIGN.items() if field not in known}
    served = TAKEN | HARMLESS | ROPE | WINDOW | set(model.takes)
    return {field: value for field, value in (foreign | known).items() if field not in served}


def _known(model: Architecture) -> dict[str, Any]:
    """The fields of transformers' class, and their defaults."""
    from transformers import CONFIG_MAPPING

    return {field.name: _default(field) for field in fields(CONFIG_MAPPING[model.model_type])}


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _window_problems(hf_config: Any, model: Architecture, context_len: int) -> Iterator[str]:
    """None of the classes has a window: it must be as long as anything that is served."""
    name, kinds = hf_config.architectures[0], getattr(hf_config, "layer_types", None) or []
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        yield f"layers of type {', '.join(others)}, which SGLang's {name} does not have; serve another checkpoint"
    # A field of transformers' class; where it has none, transformers does without a window as well.
    window = hf_config.sliding_window if "sliding_window" in _known(model) else None
    slides = "sliding_attention" in kinds
    if window is None and slides:
        yield "layers of type sliding_attention, and no sliding_window; give one, or serve another checkpoint"
    # Qwen has it in the layers that slide, the others in all.
    if window is not None and window < context_len and (slides or not model.model_type.startswith("qwen")):
        yield (
            f"sliding_window {window}, which SGLang's {name} does not have: beyond it the context of {context_len} "
            f"tokens would be answered wrongly, without an error; give --context-length {window} or less"
        )
