"""Describes a model by its ``config.json``. Step times and memory are computed from this description."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder_layer import Layer, check_dense, layer_of
from sglang_shift.models.families import FAMILIES, Family
from sglang_shift.models.fields import check_fields
from sglang_shift.models.sizes import ModelSizes
from sglang_shift.tools.plan.config import architecture_of, context_of, with_defaults

NVIDIA_QUANT_CONFIG = "hf_quant_config.json"
"""The file that says how a checkpoint of NVIDIA is quantized."""


@dataclass(frozen=True)
class Model:
    """A dense decoder.

    Attributes:
        name: The name of the model, in words.
        layer: One of its layers.
        layers: Number of its layers.
        vocabulary: Number of tokens in its vocabulary.
        context: Tokens of the longest sequence.
        weights: The format of its layers' matrices: ``bfloat16``, ``fp8`` (a scale per channel and token) or
            ``fp8_block`` (a scale per 128 x 128). Embeddings and LM head are bfloat16.
        tied_embeddings: Whether the LM head is the embedding.
        architecture: The name of its class in its configuration.
        path: The value for ``--model-path``, if it is known.
        context_is_given: Whether the user asked for this context. Then a server needs ``--context-length``.
    """

    name: str
    layer: Layer
    layers: int
    vocabulary: int
    context: int
    weights: str = "bfloat16"
    tied_embeddings: bool = False
    architecture: str = "LlamaForCausalLM"
    path: str = "MODEL"
    context_is_given: bool = False

    @property
    def family(self) -> Family:
        """The record of the model's architecture."""
        return FAMILIES[self.architecture]

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.family.qk_norm

    @property
    def quantized(self) -> bool:
        """Whether the input of each matrix of the layers is quantized."""
        return self.weights != "bfloat16"

    @property
    def sizes(self) -> ModelSizes:
        """The sizes of the weights and of the KV cache. Biases that only some models have are left out."""
        biased = frozenset(linear.role for linear in self.family.linears if linear.bias is True)
        return ModelSizes(self.family, self.layer, self.layers, self.vocabulary, self.tied_embeddings, biased)


def read_model(path: str | Path, context_length: int | None = None) -> Model:
    """Read the model of a ``config.json``, or of the folder that has this file.

    Args:
        path: The file or the folder.
        context_length: The value of the server's flag. None means the model's own context.

    Raises:
        ShiftError: there is no such file, or the model is not a dense decoder that this package serves.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        return _model(file, json.loads(file.read_text()), context_length)
    except KeyError as error:
        raise ShiftError(f"{file} has no {error}; give the config.json of a dense decoder as --model") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShiftError(f"{file}: {error}; give the config.json of a dense decoder as --model") from error


def _model(file: Path, raw: Any, context_length: int | None) -> Model:
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    check_dense(raw)
    architecture, config = architecture_of(raw), with_defaults(raw)
    # With --dtype auto, SGLang serves a model in 16 bits if its dtype is float32 or missing.
    layer, _ = layer_of({**config.to_dict(), "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32"})
    context = context_of(config, context_length)
    check_fields(config, context)
    name, path = _name(file)
    return Model(
        name, layer, config.num_hidden_layers, config.vocab_size, context,
        _weights(file, raw), config.tie_word_embeddings, architecture, path, context_length is not None,
    )  # fmt: skip


def _name(file: Path) -> tuple[str, str]:
    """Return the name of a model and its path. If the file is in the hub's cache, both are the name on the hub.

    ``_name_or_path`` of the configuration is not used. In a fine-tuned model it often names the original model.
    """
    cached = next((part for part in file.absolute().parts if part.startswith("models--")), None)
    if cached:
        return (name := cached.removeprefix("models--").replace("--", "/", 1)), name
    if file.name == "config.json":
        return file.absolute().parent.name, str(file.parent)
    return file.stem, Model.path


def _weights(file: Path, raw: dict[str, Any]) -> str:
    """Return the format of the weights. SGLang looks for a quantization in the same places."""
    key = "quantization_config" if raw.get("quantization_config") else "compression_config"
    quantization = raw.get(key)
    if not quantization:
        if file.name == "config.json" and (file.parent / NVIDIA_QUANT_CONFIG).exists():
            raise ValueError(f"{NVIDIA_QUANT_CONFIG} beside it, a quantization for which there are no figures")
        return "bfloat16"
    if not isinstance(quantization, dict):
        raise ValueError(f"{key} {quantization!r} is not an object")
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method == "compressed-tensors" and quantization.get("format") == "float-quantized":
        groups = (quantization.get("config_groups") or {}).values()
        return "fp8_block" if any(g["weights"]["strategy"] == "block" for g in groups) else "fp8"
    raise ValueError(f"quantization {method}, for which there are no figures")
