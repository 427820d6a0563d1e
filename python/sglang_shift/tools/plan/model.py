"""A model as its ``config.json`` describes it: what step times and memory are computed from."""

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
from sglang_shift.tools.plan.config import architecture_of, completed, context_of

BESIDE = "hf_quant_config.json"
"""The file in which NVIDIA's checkpoints say how they are quantized."""


@dataclass(frozen=True)
class Model:
    """A dense decoder.

    Attributes:
        name: In words.
        layer: One of its layers.
        layers: How many it has.
        vocabulary: Tokens that it knows.
        context: Tokens of the longest sequence.
        weights: What its layers' matrices are: ``bfloat16``, ``fp8`` (a scale per channel and token) or
            ``fp8_block`` (per 128 x 128). Embeddings and LM head are bfloat16.
        tied: Whether the LM head is the embedding.
        architecture: As in its configuration.
        path: What ``--model-path`` would be, where that is known.
        shortened: Whether the context is one that was asked for, which a server must be told.
    """

    name: str
    layer: Layer
    layers: int
    vocabulary: int
    context: int
    weights: str = "bfloat16"
    tied: bool = False
    architecture: str = "LlamaForCausalLM"
    path: str = "MODEL"
    shortened: bool = False

    @property
    def family(self) -> Family:
        """The record of its architecture."""
        return FAMILIES[self.architecture]

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.family.qk_norm

    @property
    def quantized(self) -> bool:
        """Whether the layers' inputs are quantized, each before its matrix."""
        return self.weights != "bfloat16"

    @property
    def sizes(self) -> ModelSizes:
        """What its weights and its KV cache are computed from. Biases that not every model has are left out."""
        biased = frozenset(linear.role for linear in self.family.linears if linear.bias is True)
        return ModelSizes(self.family, self.layer, self.layers, self.vocabulary, self.tied, biased)


def read_model(path: str | Path, context_length: int | None = None) -> Model:
    """The model of a ``config.json``, or of the folder that has one.

    Args:
        path: Of the file or the folder.
        context_length: As the server's flag; None for the model's own.

    Raises:
        ShiftError: there is none, or it is not a dense decoder that is served here.
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
    architecture, config = architecture_of(raw), completed(raw)
    # Served in 16 bits, as SGLang does with --dtype auto, where it is float32 or none is given.
    layer, _ = layer_of({**config.to_dict(), "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32"})
    context = context_of(config, context_length)
    check_fields(config, context)
    name, path = _name(file)
    return Model(
        name, layer, config.num_hidden_layers, config.vocab_size, context,
        _weights(file, raw), config.tie_word_embeddings, architecture, path, context_length is not None,
    )  # fmt: skip


def _name(file: Path) -> tuple[str, str]:
    """What to call a model, and the path to it: as on the hub, where the file is in its cache.

    Not ``_name_or_path`` of the configuration: in a fine-tuned model's, that is often the model before.
    """
    cached = next((part for part in file.absolute().parts if part.startswith("models--")), None)
    if cached:
        return (name := cached.removeprefix("models--").replace("--", "/", 1)), name
    if file.name == "config.json":
        return file.absolute().parent.name, str(file.parent)
    return file.stem, Model.path


def _weights(file: Path, raw: dict[str, Any]) -> str:
    """What the weights are, from the places where SGLang looks for a quantization."""
    key = "quantization_config" if raw.get("quantization_config") else "compression_config"
    quantization = raw.get(key)
    if not quantization:
        if file.name == "config.json" and (file.parent / BESIDE).exists():
            raise ValueError(f"{BESIDE} beside it, a quantization for which there are no figures")
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
