"""What SGLang and transformers compute differently of the rope, the encoding of positions, by its parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sglang_shift.seams import relies_on

LENGTH = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"

# Parameters that both read, by type of rope.
KEYS: dict[str, frozenset[str]] = {
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", LENGTH, "low_freq_factor", "high_freq_factor")),
    "yarn": frozenset(
        ("factor", LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ),
    "longrope": frozenset(("factor", LENGTH, "attention_factor", "short_factor", "long_factor")),
}
# SGLang's only, of yarn, and how it answers as transformers does, which does not read them.
YARN_NEUTRAL = {"attn_factor": 1, "extrapolation_factor": 1}
# "default" is also what is left when another type is switched off, with all of its parameters.
KEYS["default"] = frozenset().union(*KEYS.values())
OF_ANY_TYPE = frozenset(("rope_type", "type", "rope_theta", PARTIAL, "finetuned"))


@relies_on("sglang.srt.layers.rotary_embedding.factory:get_rope", "it says which parameters of a rope SGLang reads")
def rope_problems(hf_config: Any, takes: Collection[str], context_len: int) -> Iterator[str]:
    """What of the rope would be computed otherwise than transformers does, in words that follow "has".

    Args:
        hf_config: The model's Hugging Face configuration.
        takes: :data:`LENGTH` and :data:`PARTIAL` if SGLang's class reads them beside the rope's parameters.
        context_len: The longest sequence that is served.
    """
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        yield f"rope parameters by type of layer ({', '.join(nested)}), which SGLang does not read; give one for all"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "dynamic":
        yield (
            "rope type 'dynamic', which SGLang scales for the longest sequence at every length; "
            f"{override('rope_scaling', {'rope_type': 'default', 'type': 'default'})} with --context-length "
            f"{hf_config.max_position_embeddings} or less is the same without"
        )
    if kind not in KEYS:
        yield f"rope type {kind!r}, which is not served; these are: {', '.join(sorted(KEYS))}"
    if kind == "default" and rope.get("type", kind) != kind:
        yield f"rope_type 'default' and type {rope['type']!r}, and SGLang goes by the former; give both alike"
    for key in sorted(rope.keys() - KEYS[kind] - OF_ANY_TYPE):
        if kind == "yarn" and key in YARN_NEUTRAL:
            if rope[key] != YARN_NEUTRAL[key]:
                yield (
                    f"{key} {short(rope[key])} for rope type 'yarn', which only SGLang reads; give "
                    f"{override('rope_scaling', {key: YARN_NEUTRAL[key]})}, or serve another checkpoint"
                )
        elif rope[key] is not None:
            yield (
                f"{key} {short(rope[key])} for rope type {kind!r}, which SGLang and transformers do not read alike; "
                "remove it, or serve another checkpoint"
            )
    yield from _partial_problems(hf_config, takes, rope)
    theta, among = getattr(hf_config, "rope_theta", None), rope.get("rope_theta")
    if None not in (theta, among) and theta != among:  # transformers leaves one; the user's override is another
        yield (
            f"rope_theta {theta}, and {among} among the rope's parameters, which SGLang takes; give "
            f"{override('rope_scaling', {'rope_theta': theta})}"
        )
    length, beside = rope.get(LENGTH), getattr(hf_config, LENGTH, None)
    if LENGTH in takes or length is None:
        length = beside or length or hf_config.max_position_embeddings
    elif LENGTH in KEYS[kind] and kind != "default" and beside not in (None, length):
        yield f"{LENGTH} {beside}, and {length} among the rope's parameters, which SGLang takes; make them agree"
    if kind in PROBLEMS:
        yield from PROBLEMS[kind](rope, length, hf_config.max_position_embeddings / length, context_len)


def _partial_problems(hf_config: Any, takes: Collection[str], rope: dict[str, Any]) -> Iterator[str]:
    """SGLang's Phi-3 reads it beside the rope's parameters, transformers' among them; the others have neither."""
    beside = getattr(hf_config, PARTIAL, None) if PARTIAL in takes else None
    among = rope.get(PARTIAL) or beside or 1
    if among == (beside or 1):
        return
    if PARTIAL in takes:
        yield (
            f"{PARTIAL} {among} among the rope's parameters, where SGLang does not read it; give "
            f"{override(PARTIAL, among)} as well"
        )
    yield f"{PARTIAL} {among} among the rope's parameters, which SGLang does not read; serve another checkpoint"


def _linear(rope: dict[str, Any], length: int, ratio: float, context_len: int) -> Iterator[str]:
    factor = rope.get("factor")
    if not isinstance(factor, float):
        yield (
            f"factor {factor!r} for rope type 'linear', with which SGLang fails; give a number with a point: "
            f"{override('rope_scaling', {'factor': float(factor or 1)})}"
        )
    # Where the context goes by another field, max_sequence_length, or by the user.
    elif context_len > (longest := int(round(length * ratio) * factor)):
        yield (
            f"rope type 'linear', which SGLang does not scale beyond {longest} tokens, max_position_embeddings times "
            f"{factor:g}, and the context is {context_len}; give --context-length {longest} or less"
        )


def _yarn(rope: dict[str, Any], length: int, ratio: float, context_len: int) -> Iterator[str]:
    factor, mscale, all_dim = rope.get("factor") or 0.0, rope.get("mscale"), rope.get("mscale_all_dim")
    if not factor or any(key in rope and not rope[key] for key in ("beta_fast", "beta_slow")):
        yield "factor, beta_fast or beta_slow null or 0 for rope type 'yarn', with which SGLang fails; give numbers"
    scale = _yarn_scale(factor, 1)
    if mscale is not None and all_dim is not None:
        if not mscale or not all_dim:
            yield "mscale or mscale_all_dim 0 for rope type 'yarn', which SGLang does not take for none; remove both"
        scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
    yield from _attention_factor(rope, scale)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: dict[str, Any], length: int, ratio: float, context_len: int) -> Iterator[str]:
    factor = rope.get("factor")
    if factor is not None and not math.isclose(factor, ratio):
        yield (
            f"factor {factor} for rope type 'longrope', for which SGLang takes max_position_embeddings / {LENGTH}, "
            f"here {ratio:g}; make them agree"
        )
    yield from _attention_factor(rope, math.sqrt(1 + math.log(ratio) / math.log(length)) if ratio > 1 else 1.0)
    if context_len > length:
        yield (
            f"rope type 'longrope', whose long factors SGLang takes for a whole batch as soon as one of its tokens is "
            f"beyond {length}, so that answers would depend on other requests; give --context-length {length} or less"
        )


def _attention_factor(rope: dict[str, Any], computed: float) -> Iterator[str]:
    given = rope.get("attention_factor")
    if given is not None and not math.isclose(given, computed, rel_tol=1e-6):
        yield f"attention_factor {given} for the rope, for which SGLang takes {computed:.6g}; serve another checkpoint"


PROBLEMS: dict[str, Callable[[dict[str, Any], int, float, int], Iterator[str]]] = {
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


def override(field: str, value: Any) -> str:
    """The flag that gives a field of ``config.json`` another value."""
    return f"--json-model-override-args '{json.dumps({field: value})}'"


def short(value: Any) -> str:
    """A value in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
