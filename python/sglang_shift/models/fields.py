"""Refuses fields of a model's ``config.json`` that SGLang's class does not compute as transformers does.

SGLang's classes read the fields that they know, and ignore other fields without a message. So a checkpoint with another
field would get wrong answers. The facts about fields come from the sources of SGLang and transformers. The tests check
them: they read which fields the sources name, and compare the answers.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from sglang_shift.errors import Refusal
from sglang_shift.models.decoder_layer import EXPERTS
from sglang_shift.models.families import ORIGINAL_LENGTH, PARTIAL_ROTARY, Family, Role, Window
from sglang_shift.models.rope_fields import ROPE_RULES
from sglang_shift.models.rules import Checkpoint, override, rule, short
from sglang_shift.seams import relies_on

COMMON_FIELDS = frozenset(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "dtype")
)  # fmt: skip
"""Fields that every class reads as transformers does."""

HARMLESS = frozenset(
    ("transformers_version", "architectures", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
     "id2label", "label2id", "problem_type", "initializer_range", "use_cache", "pad_token_id", "bos_token_id",
     "eos_token_id", "pretraining_tp", "attention_dropout", "resid_pdrop", "embd_pdrop")
)  # fmt: skip
"""Fields that do not change any answer: names, training, token ids, and the way in which the same sums are divided."""

ROPE = frozenset(("rope_parameters", ORIGINAL_LENGTH))
WINDOW = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))

# Fields of other models that change what is computed, and the values with which they change nothing (like null). None
# of the families has them in transformers. SGLang's classes ignore them, or read them although transformers does not.
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
         "scale_emb", "embedding_scale", PARTIAL_ROTARY, "rotary_pct", "loop_num", "num_loops", "hc_mult"), 1
    ),
    **dict.fromkeys(
        ("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base", "attn_logit_softcapping",
         "final_logit_softcapping", "clip_qkv", "no_rope_layers", "no_rope_layer_interval", "rotary_dim",
         "layer_rope_theta", "rope_local_base_freq", "attention_chunk_size", "sliding_window_pattern",
         "dual_chunk_attention_config", "original_num_attention_heads", "linear_attn_config", "engram_layer_ids",
         "hidden_activation"), None
    ),
    **dict.fromkeys(EXPERTS, 0),
}  # fmt: skip


FIELD = Refusal(
    "config.json has {problem}",
    "SGLang's class does not compute what the field says, so its answers would be wrong. The message has the field, "
    "and the way out if there is one: [what is refused](models.md#what-is-refused).",
)


@relies_on("sglang.srt.models.llama:LlamaDecoderLayer.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.llama:LlamaAttention.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.llama:LlamaMLP.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.qwen2:Qwen2DecoderLayer.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.qwen2:Qwen2Attention.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.qwen2:Qwen2MLP.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.qwen3:Qwen3DecoderLayer.__init__", "Our rules list the fields that this code reads.")
@relies_on("sglang.srt.models.qwen3:Qwen3Attention.__init__", "Our rules list the fields that this code reads.")
def check_fields(hf_config: Any, context_len: int) -> None:
    """Check that SGLang's class computes what the model's configuration says, up to the length of the context.

    Args:
        hf_config: Its Hugging Face configuration, whose architecture is in :data:`FAMILIES`.
        context_len: The longest sequence that is served.

    Raises:
        Refused: the class does not compute some field. The message names the field, and the way out if there is one.
    """
    checkpoint = Checkpoint(hf_config, context_len)
    for each in RULES:
        if problem := each.problem(checkpoint):
            raise FIELD(problem=problem)


def supported_fields(family: Family) -> frozenset[str]:
    """Return the fields that SGLang's class reads as transformers does, except fields of the rope and the window."""
    return COMMON_FIELDS | family.bias_fields | set(family.rope_fields)


def neutral_values(family: Family) -> dict[str, Any]:
    """Return the fields that must change nothing, and the values with which they change nothing."""
    known, redundant = transformers_defaults(family), _redundant_fields(family)
    foreign = {field: field in redundant or value for field, value in FOREIGN.items() if field not in known}
    supported = supported_fields(family) | HARMLESS | ROPE | WINDOW
    return {field: value for field, value in (foreign | known).items() if field not in supported}


def transformers_defaults(family: Family) -> dict[str, Any]:
    """Return the fields of transformers' class, and their defaults."""
    from transformers import CONFIG_MAPPING

    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(CONFIG_MAPPING[family.model_type])
    }


def _redundant_fields(family: Family) -> set[str]:
    """Return other models' fields that may be true, because the family always has what they state."""
    redundant = {"use_qk_norm"} if family.qk_norm else set()
    biased = any(linear.role is Role.QKV and linear.bias is True for linear in family.linears)
    return redundant | ({"attention_bias", "qkv_bias"} if biased else set())


@rule(
    "a `model_type` that is not the architecture's",
    "SGLang reads the architecture, and transformers reads the type.",
    "If the weights are the architecture's, give the override in the message.",
)
def other_type(checkpoint: Checkpoint) -> str | None:
    """For example, a Mistral with ``layer_types`` has the type ministral."""
    family = checkpoint.family
    if checkpoint.config.model_type == family.model_type:
        return None
    return (
        f"architecture {family.architecture} and model_type {checkpoint.config.model_type!r}, and SGLang would compute "
        "the former where transformers computes the latter; if the weights are the former's, give "
        f"{override('model_type', family.model_type)}"
    )


@rule("`per_layer_config`", "SGLang does not read it.")
def per_layer(checkpoint: Checkpoint) -> str | None:
    """Transformers' class stores this as a property."""
    if not getattr(checkpoint.config, "is_heterogeneous", False):
        return None
    return f"per_layer_config, which SGLang's {checkpoint.family.architecture} does not read; serve another checkpoint"


@rule(
    "a field of the table below with another value than there",
    "SGLang ignores the field, or reads it although transformers does not.",
    "If the weights do without it, remove the field or give the override in the message. "
    "If the field is `bias`, its name should be `attention_bias`.",
)
def foreign_field(checkpoint: Checkpoint) -> str | None:
    """Null and an empty list also change nothing."""
    for field, without in neutral_values(checkpoint.family).items():
        value = getattr(checkpoint.config, field, None)
        if value not in (None, [], without):
            return (
                f"{field} {short(value)}, with which SGLang's {checkpoint.family.architecture} would answer wrongly, "
                f"without an error; if the weights do without it, remove it or give {override(field, without)}"
            )
    return None


@rule("`layer_types` with other types than `full_attention` and `sliding_attention`", "SGLang has no such layers.")
def other_layers(checkpoint: Checkpoint) -> str | None:
    """For example, layers of chunked or of linear attention."""
    others = sorted(set(_layer_types(checkpoint)) - {"full_attention", "sliding_attention"})
    if not others:
        return None
    name = checkpoint.family.architecture
    return f"layers of type {', '.join(others)}, which SGLang's {name} does not have; serve another checkpoint"


@rule(
    "`layer_types` with `sliding_attention`, and no `sliding_window`",
    "No window is known for these layers.",
    "Give a `sliding_window`, if transformers reads one for the family.",
)
def window_without_length(checkpoint: Checkpoint) -> str | None:
    """Transformers would fail, or would ignore the window in a family that has none."""
    if _window(checkpoint) is not None or "sliding_attention" not in _layer_types(checkpoint):
        return None
    return "layers of type sliding_attention, and no sliding_window; give one, or serve another checkpoint"


@rule(
    "a `sliding_window` shorter than the context, in a model that uses it",
    "SGLang attends to all tokens.",
    "Give `--context-length` of at most the window. Then no token is outside of it.",
    lambda family: family.window is not Window.NONE,
)
def short_window(checkpoint: Checkpoint) -> str | None:
    """None of SGLang's classes has a window, so the window must be as long as the longest sequence that is served."""
    family, window, context = checkpoint.family, _window(checkpoint), checkpoint.context
    if window is None or window >= context:
        return None
    if family.window is Window.SLIDING and "sliding_attention" not in _layer_types(checkpoint):
        return None
    return (
        f"sliding_window {window}, which SGLang's {family.architecture} does not have: beyond it the context of "
        f"{context} tokens would be answered wrongly, without an error; give --context-length {window} or less"
    )


def _layer_types(checkpoint: Checkpoint) -> list[str]:
    return getattr(checkpoint.config, "layer_types", None) or []


def _window(checkpoint: Checkpoint) -> int | None:
    """Return ``sliding_window``, or None if transformers applies a window to no layer of the family."""
    return None if checkpoint.family.window is Window.NONE else checkpoint.config.sliding_window


FIELD_RULES = (other_type, per_layer, foreign_field)
WINDOW_RULES = (other_layers, window_without_length, short_window)
RULES = (*FIELD_RULES, *ROPE_RULES, *WINDOW_RULES)
"""All rules, in the order in which they are checked."""
