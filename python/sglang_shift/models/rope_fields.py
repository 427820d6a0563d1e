"""Has rules for parameters of the rope (the encoding of positions) that SGLang and transformers treat differently."""

from __future__ import annotations

import math

from sglang_shift.models.families import ORIGINAL_LENGTH, PARTIAL_ROTARY
from sglang_shift.models.rules import Checkpoint, override, rule, short
from sglang_shift.seams import relies_on

ROPE_PARAMETERS: dict[str, frozenset[str]] = {
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", ORIGINAL_LENGTH, "low_freq_factor", "high_freq_factor")),
    "yarn": frozenset(
        ("factor", ORIGINAL_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate")
    ),
    "longrope": frozenset(("factor", ORIGINAL_LENGTH, "attention_factor", "short_factor", "long_factor")),
}  # fmt: skip
"""Parameters that both SGLang and transformers read, by type of rope."""

# "default" also remains if another type is switched off but its parameters are still there.
ROPE_PARAMETERS["default"] = frozenset().union(*ROPE_PARAMETERS.values())

OF_ANY_TYPE = frozenset(("rope_type", "type", "rope_theta", PARTIAL_ROTARY, "finetuned"))

YARN_NEUTRAL = {"attn_factor": 1, "extrapolation_factor": 1}
"""Parameters of yarn that only SGLang reads, and the values with which SGLang answers as transformers does."""


@rule("rope parameters by type of layer", "SGLang does not read them.", "Give one set of parameters for all layers.")
def by_layer_type(checkpoint: Checkpoint) -> str | None:
    """SGLang builds one rope for all layers."""
    if nested := [key for key, value in checkpoint.rope.items() if isinstance(value, dict)]:
        return f"rope parameters by type of layer ({', '.join(nested)}), which SGLang does not read; give one for all"
    return None


@rule(
    "rope type `dynamic`",
    "SGLang scales for the longest sequence, whatever the length of a prompt.",
    "Give the override in the message, with `--context-length` of at most `max_position_embeddings`.",
)
def dynamic_type(checkpoint: Checkpoint) -> str | None:
    """Transformers scales for the current sequence."""
    if checkpoint.rope_type != "dynamic":
        return None
    return (
        "rope type 'dynamic', which SGLang scales for the longest sequence at every length; "
        f"{override('rope_scaling', {'rope_type': 'default', 'type': 'default'})} with --context-length "
        f"{checkpoint.config.max_position_embeddings} or less is the same without"
    )


@rule("another rope type that is not in the table above", "It has not been compared with transformers.")
def unknown_type(checkpoint: Checkpoint) -> str | None:
    """The rules below know only the types in :data:`ROPE_PARAMETERS`."""
    if (kind := checkpoint.rope_type) in ROPE_PARAMETERS:
        return None
    return f"rope type {kind!r}, which is not served; these are: {', '.join(sorted(ROPE_PARAMETERS))}"


@rule(
    "`rope_type` with the value `default`, and `type` with another value",
    "SGLang reads `rope_type`.",
    "Give both the same value.",
)
def two_types(checkpoint: Checkpoint) -> str | None:
    """This happens if a user asks for another type by the old name."""
    kind, rope = checkpoint.rope_type, checkpoint.rope
    if kind == "default" and rope.get("type", kind) != kind:
        return f"rope_type 'default' and type {rope['type']!r}, and SGLang goes by the former; give both alike"
    return None


@rule(
    f"rope type `yarn` with {' or '.join(f'`{name}`' for name in YARN_NEUTRAL)}",
    "SGLang reads this parameter, and transformers does not.",
    "Give the override in the message. With it, SGLang answers as transformers does.",
)
def yarn_sglang_parameter(checkpoint: Checkpoint) -> str | None:
    """DeepSeek-R1-0528-Qwen3-8B has such a parameter."""
    if checkpoint.rope_type != "yarn":
        return None
    for key in sorted(checkpoint.rope.keys() & YARN_NEUTRAL.keys()):
        if checkpoint.rope[key] != YARN_NEUTRAL[key]:
            return (
                f"{key} {short(checkpoint.rope[key])} for rope type 'yarn', which only SGLang reads; give "
                f"{override('rope_scaling', {key: YARN_NEUTRAL[key]})}, or serve another checkpoint"
            )
    return None


@rule("a parameter of the rope that is not in the table above", "SGLang and transformers read it differently.")
@relies_on(
    "sglang.srt.layers.rotary_embedding.factory:get_rope",
    "Our rules list the rope parameters that this function reads.",
)
def unknown_parameter(checkpoint: Checkpoint) -> str | None:
    """:data:`ROPE_PARAMETERS` has the parameters of each type that both read."""
    kind, rope = checkpoint.rope_type, checkpoint.rope
    known_parameters = ROPE_PARAMETERS[kind] | OF_ANY_TYPE | (YARN_NEUTRAL.keys() if kind == "yarn" else set())
    for key in sorted(rope.keys() - known_parameters):
        if rope[key] is not None:
            return (
                f"{key} {short(rope[key])} for rope type {kind!r}, which SGLang and transformers do not read alike; "
                "remove it, or serve another checkpoint"
            )
    return None


@rule(
    f"`{PARTIAL_ROTARY}` among the parameters of the rope only",
    "SGLang reads it beside these parameters, and transformers among them.",
    "Give it in both places.",
    lambda family: PARTIAL_ROTARY in family.rope_fields,
)
def partial_rotary_inside(checkpoint: Checkpoint) -> str | None:
    """This is for the families whose class in SGLang rotates a part of each head."""
    outer = getattr(checkpoint.config, PARTIAL_ROTARY, None) or 1
    if (inner := checkpoint.rope.get(PARTIAL_ROTARY) or outer) == outer:
        return None
    return (
        f"{PARTIAL_ROTARY} {inner} among the rope's parameters, where SGLang does not read it; give "
        f"{override(PARTIAL_ROTARY, inner)} as well"
    )


@rule(
    f"`{PARTIAL_ROTARY}` among the parameters of the rope",
    "SGLang does not read it.",
    concerns=lambda family: PARTIAL_ROTARY not in family.rope_fields,
)
def partial_rotary(checkpoint: Checkpoint) -> str | None:
    """This is for the families whose class in SGLang rotates the whole of each head."""
    if (inner := checkpoint.rope.get(PARTIAL_ROTARY) or 1) == 1:
        return None
    return f"{PARTIAL_ROTARY} {inner} among the rope's parameters, which SGLang does not read; serve another checkpoint"


@rule(
    "`rope_theta` in `--json-model-override-args`",
    "SGLang reads the value among the parameters of the rope.",
    "Give the override in the message.",
)
def two_thetas(checkpoint: Checkpoint) -> str | None:
    """Transformers keeps only one value, so the other value is the user's override."""
    theta, inner = getattr(checkpoint.config, "rope_theta", None), checkpoint.rope.get("rope_theta")
    if theta is None or inner is None or theta == inner:
        return None
    return (
        f"rope_theta {theta}, and {inner} among the rope's parameters, which SGLang takes; give "
        f"{override('rope_scaling', {'rope_theta': theta})}"
    )


@rule(
    f"two values of `{ORIGINAL_LENGTH}`",
    "SGLang reads the value among the parameters of the rope.",
    "Give both the same value.",
    lambda family: ORIGINAL_LENGTH not in family.rope_fields,
)
def two_lengths(checkpoint: Checkpoint) -> str | None:
    """This is for the families whose class in SGLang reads the length in one place only."""
    kind, inner = checkpoint.rope_type, checkpoint.rope.get(ORIGINAL_LENGTH)
    outer = getattr(checkpoint.config, ORIGINAL_LENGTH, None)
    if inner is None or kind == "default" or ORIGINAL_LENGTH not in ROPE_PARAMETERS[kind] or outer in (None, inner):
        return None
    return f"{ORIGINAL_LENGTH} {outer}, and {inner} among the rope's parameters, which SGLang takes; make them agree"


@rule("rope type `linear` with a whole number as its factor", "SGLang fails while it loads.", "Write `4.0` for `4`.")
def whole_linear_factor(checkpoint: Checkpoint) -> str | None:
    """SGLang takes a factor that is not a float for a list of factors."""
    factor = checkpoint.rope.get("factor")
    if checkpoint.rope_type != "linear" or isinstance(factor, float):
        return None
    return (
        f"factor {factor!r} for rope type 'linear', with which SGLang fails; give a number with a point: "
        f"{override('rope_scaling', {'factor': float(factor or 1)})}"
    )


@rule(
    "rope type `linear` with a context beyond `max_position_embeddings` times the factor",
    "SGLang does not scale the positions beyond that.",
    "Give `--context-length` of at most that.",
)
def beyond_linear(checkpoint: Checkpoint) -> str | None:
    """This happens if the user or the field max_sequence_length (Vicuna 16k) decides the context."""
    if checkpoint.rope_type != "linear":
        return None
    factor = checkpoint.rope["factor"]
    longest = int(round(checkpoint.original_length * checkpoint.length_ratio) * factor)
    if checkpoint.context <= longest:
        return None
    return (
        f"rope type 'linear', which SGLang does not scale beyond {longest} tokens, max_position_embeddings times "
        f"{factor:g}, and the context is {checkpoint.context}; give --context-length {longest} or less"
    )


@rule(
    "rope type `yarn` with `factor`, `beta_fast` or `beta_slow` null or 0",
    "SGLang fails while it loads.",
    "Give numbers.",
)
def yarn_without_numbers(checkpoint: Checkpoint) -> str | None:
    """Transformers has defaults for these."""
    rope = checkpoint.rope
    if checkpoint.rope_type != "yarn":
        return None
    if rope.get("factor") and not any(key in rope and not rope[key] for key in ("beta_fast", "beta_slow")):
        return None
    return "factor, beta_fast or beta_slow null or 0 for rope type 'yarn', with which SGLang fails; give numbers"


@rule(
    "rope type `yarn` with `mscale` or `mscale_all_dim` 0",
    "SGLang computes with 0, and transformers without either.",
    "Remove both.",
)
def yarn_without_mscale(checkpoint: Checkpoint) -> str | None:
    """Transformers uses both if neither is 0."""
    if checkpoint.rope_type != "yarn":
        return None
    mscales = checkpoint.rope.get("mscale"), checkpoint.rope.get("mscale_all_dim")
    if None in mscales or all(mscales):
        return None
    return "mscale or mscale_all_dim 0 for rope type 'yarn', which SGLang does not take for none; remove both"


@rule(
    f"rope type `longrope` with a `factor` that is not `max_position_embeddings` / `{ORIGINAL_LENGTH}`",
    "SGLang computes with that quotient.",
    "Make the two agree.",
)
def longrope_factor(checkpoint: Checkpoint) -> str | None:
    """SGLang does not read the factor."""
    factor = checkpoint.rope.get("factor")
    if checkpoint.rope_type != "longrope" or factor is None or math.isclose(factor, checkpoint.length_ratio):
        return None
    return (
        f"factor {factor} for rope type 'longrope', for which SGLang takes max_position_embeddings / "
        f"{ORIGINAL_LENGTH}, here {checkpoint.length_ratio:g}; make them agree"
    )


@rule("rope type `yarn` or `longrope` with an unusual `attention_factor`", "SGLang computes the usual one.")
def attention_factor(checkpoint: Checkpoint) -> str | None:
    """SGLang does not read the attention factor."""
    if checkpoint.rope_type not in ("yarn", "longrope"):
        return None
    given = checkpoint.rope.get("attention_factor")
    computed = _yarn_attention(checkpoint) if checkpoint.rope_type == "yarn" else _longrope_attention(checkpoint)
    if given is None or math.isclose(given, computed, rel_tol=1e-6):
        return None
    return f"attention_factor {given} for the rope, for which SGLang takes {computed:.6g}; serve another checkpoint"


def _yarn_attention(checkpoint: Checkpoint) -> float:
    factor = checkpoint.rope["factor"]
    mscale, all_dim = checkpoint.rope.get("mscale"), checkpoint.rope.get("mscale_all_dim")
    if mscale is None or all_dim is None:
        return _yarn_scale(factor, 1)
    return _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope_attention(checkpoint: Checkpoint) -> float:
    ratio = checkpoint.length_ratio
    return math.sqrt(1 + math.log(ratio) / math.log(checkpoint.original_length)) if ratio > 1 else 1.0


@rule(
    f"rope type `longrope` with a context beyond `{ORIGINAL_LENGTH}`",
    "SGLang takes the long factors for a whole batch as soon as one of its tokens is beyond.",
    "Give `--context-length` of at most that.",
)
def beyond_longrope(checkpoint: Checkpoint) -> str | None:
    """Transformers chooses the factors for each sequence by its length."""
    length = checkpoint.original_length
    if checkpoint.rope_type != "longrope" or checkpoint.context <= length:
        return None
    return (
        f"rope type 'longrope', whose long factors SGLang takes for a whole batch as soon as one of its tokens is "
        f"beyond {length}, so that answers would depend on other requests; give --context-length {length} or less"
    )


ROPE_RULES = (
    by_layer_type, dynamic_type, unknown_type, two_types, yarn_sglang_parameter, unknown_parameter,
    partial_rotary_inside, partial_rotary, two_thetas, two_lengths, whole_linear_factor, beyond_linear,
    yarn_without_numbers, yarn_without_mscale, longrope_factor, attention_factor, beyond_longrope,
)  # fmt: skip
"""The order matters: a later rule relies on what an earlier rule has excluded."""
