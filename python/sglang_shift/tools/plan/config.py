"""The content of a ``config.json`` as SGLang's server reads it: what it leaves out, and its context."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from sglang.srt.utils.hf_transformers import get_context_length
from transformers import CONFIG_MAPPING

from sglang_shift.args.model_check import ARCHITECTURES
from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_layer import MOST, size_in

REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Sizes whose defaults, where there are any, are those of another model."""

INSIDE = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where models of more than text have their language model's configuration."""

APART = ("dtype", "torch_dtype", "quantization_config")
"""Fields that transformers makes objects of, and that are read as they are here."""


def architecture_of(raw: dict[str, Any]) -> str:
    """The class that serves it.

    Raises:
        KeyError, ValueError: there is none, or it is not served here.
    """
    names = raw["architectures"] or ["no architecture"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise ValueError(f"architectures {names!r} is not a list of names")
    if names[0] not in ARCHITECTURES:
        raise ValueError(f"{names[0]}, which is none of {', '.join(ARCHITECTURES)}")
    if inside := next((name for name in INSIDE if raw.get(name) is not None), None):
        raise ValueError(f"{inside}, a model inside another")
    return names[0]


def completed(raw: dict[str, Any]) -> Any:
    """Transformers' object: fields that are not there have the defaults of the ``model_type``.

    They differ. Without num_key_value_heads, a Llama has as many as heads and a Mistral 8; without head_dim, a Qwen3
    has 128.

    Raises:
        KeyError, ValueError: it misses what no default stands for, or transformers refuses it.
    """
    for name in REQUIRED:
        size_in(raw, name)
    if raw["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"model_type {raw['model_type']!r}, which is unknown")
    content = {key: value for key, value in raw.items() if key not in APART}
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(deepcopy(content))  # it changes what is inside
    except Exception as error:  # whatever transformers raises
        raise ValueError(" ".join(str(error.__cause__ or error).split()).rstrip(".")) from error


def context_of(config: Any, given: int | None = None) -> int:
    """Tokens of the longest sequence that a server takes, by SGLang's rule.

    Args:
        config: The model's.
        given: ``--context-length``, if it is given.

    Raises:
        ShiftError: more is given than that.
        ValueError: that is none, or no room for a prompt and an output.
    """
    size_in({"max_position_embeddings": config.max_position_embeddings}, "max_position_embeddings", least=2)
    try:
        context = get_context_length(config)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"no context length ({error})") from error
    if not 2 <= context <= MOST:
        raise ValueError(f"a context of {context:.6g} tokens")
    if given is not None and given > context:
        raise ShiftError(f"--context-length {given} is more than the model's {context}; give that or less")
    return context if given is None else given
