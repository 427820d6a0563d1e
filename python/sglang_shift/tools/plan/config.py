"""Reads the content of a ``config.json`` as SGLang's server does: the defaults of missing fields, and the context."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from sglang.srt.configs.model_config import is_hybrid_swa_model
from sglang.srt.utils.hf_transformers import get_context_length
from transformers import CONFIG_MAPPING

from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_config import NESTED_CONFIGS, TRAITS, UNGATED
from sglang_shift.models.decoder_layer import ELEMENT_BYTES, MOST, size_in
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.whole_prefixes import other_layers

REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Sizes that must be given. If they have defaults, these are the sizes of another model."""

RAW_FIELDS = ("dtype", "torch_dtype", "quantization_config")
"""Fields that transformers turns into objects. This package reads them as they are in the file."""

_TRANSFORMERS = "SGLang has no class of its own for it, and SP mode cannot divide transformers' class"
_STAGES = "SGLang's class takes the number of a rank for that of a pipeline stage, so it runs on one GPU only"
NOT_SERVED = {
    "SmolLM3ForCausalLM": _TRANSFORMERS,
    "NemotronForCausalLM": _TRANSFORMERS,
    "Starcoder2ForCausalLM": _STAGES,
    "PhiForCausalLM": _STAGES,
    "OlmoeForCausalLM": "SGLang's class norms the heads of a rank with the weights of all heads",
}
"""Architectures whose matrices are known, and why a plan could not be carried out: docs/data/models.csv."""

PLANNED = tuple(
    name
    for name, traits in TRAITS.items()
    if traits is not UNGATED and name.endswith("ForCausalLM") and name not in NOT_SERVED
)
"""The architectures of models that can be planned for: of text only, and with the usual names of fields."""


def check_dtype(raw: dict[str, Any]) -> None:
    """Check that a server serves the model in 16 bits, which it does with a dtype of 32 bits as well, or without one.

    Raises:
        ValueError: the dtype is another one.
    """
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype {dtype}")


def architecture_of(raw: dict[str, Any]) -> str:
    """Return the name of the class that serves the model.

    Raises:
        KeyError, ValueError: the configuration names no class, a class whose matrices are not known, or a class that
            cannot be divided.
    """
    names = raw["architectures"] or ["no architecture"]
    if not (isinstance(names, list) and isinstance(names[0], str)):
        raise ValueError(f"architectures {names!r} is not a list of names")
    if reason := NOT_SERVED.get(names[0]):
        raise ValueError(f"{names[0]} cannot be planned for, because {reason}")
    if names[0] not in PLANNED:
        raise ValueError(f"{names[0]}, which is none of {', '.join(FAMILIES)} and the others of docs/cost-model.md")
    if nested := next((name for name in NESTED_CONFIGS if raw.get(name) is not None), None):
        raise ValueError(f"{nested}, a model inside another")
    return names[0]


def has_other_layers(config: Any, architecture: str) -> bool:
    """Whether not all layers attend to whole prefixes. Then a server refuses ``--dcp-size`` above 1.

    Args:
        config: The model's configuration.
        architecture: The name of its class.
    """
    windowed = is_hybrid_swa_model([architecture], config)
    return other_layers(SimpleNamespace(hf_config=config, is_hybrid_swa=windowed), architecture) is not None


def with_defaults(raw: dict[str, Any]) -> Any:
    """Return transformers' object of the configuration. Missing fields have the defaults of the ``model_type``.

    The defaults differ between model types. Without num_key_value_heads, a Llama has one KV head for each head, and a
    Mistral has 8 KV heads. Without head_dim, a Qwen3 has a head_dim of 128.

    Raises:
        KeyError, ValueError: a required field is missing, or transformers refuses the configuration.
    """
    for name in REQUIRED:
        size_in(raw, name)
    if raw["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"model_type {raw['model_type']!r}, which is unknown")
    content = {key: value for key, value in raw.items() if key not in RAW_FIELDS}
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(deepcopy(content))  # from_dict changes nested values
    except Exception as error:  # transformers raises errors of any type
        raise ValueError(" ".join(str(error.__cause__ or error).split()).rstrip(".")) from error


def context_of(config: Any, context_length: int | None = None) -> int:
    """Return the tokens of the longest sequence that a server takes, by SGLang's rule.

    Args:
        config: The model's configuration.
        context_length: The value of ``--context-length``, if the flag is given.

    Raises:
        ShiftError: ``context_length`` is more than the model's context.
        ValueError: the model's context is no number, or has no room for a prompt and an output.
    """
    size_in({"max_position_embeddings": config.max_position_embeddings}, "max_position_embeddings", least=2)
    try:
        context = get_context_length(config)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"no context length ({error})") from error
    if not 2 <= context <= MOST:
        raise ValueError(f"a context of {context:.6g} tokens")
    if context_length is not None and context_length > context:
        raise ShiftError(f"--context-length {context_length} is more than the model's {context}; give that or less")
    return context if context_length is None else context_length
