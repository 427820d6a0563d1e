"""Describes a model by its ``config.json``. Step times and memory are computed from this description."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder import Decoder
from sglang_shift.models.decoder_config import TRAITS, decoder_of
from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.fields import check_fields
from sglang_shift.models.formats import FORMATS, Format, format_of
from sglang_shift.models.sizes import SHARDED, ModelSizes
from sglang_shift.tools.plan.config import architecture_of, check_dtype, context_of, has_other_layers, with_defaults

NVIDIA_QUANT_CONFIG = "hf_quant_config.json"
"""The file that says how a checkpoint of NVIDIA is quantized."""


@dataclass(frozen=True)
class Model:
    """A decoder.

    Attributes:
        name: The name of the model, in words.
        layer: Its attention, and the MLP of its dense layers.
        layers: Number of its layers.
        vocabulary: Number of tokens in its vocabulary.
        context: Tokens of the longest sequence.
        weights: The format of its layers' matrices: a name in :data:`FORMATS`. Embeddings and LM head are bfloat16.
        tied_embeddings: Whether the LM head is the embedding.
        architecture: The name of its class in its configuration.
        path: The value for ``--model-path``, if it is known.
        context_is_given: Whether the user asked for this context. Then a server needs ``--context-length``.
        description: Everything about its matrices. None means that it is dense, without biases of some models only.
        quantization: The format of the matrices, if the name does not say everything.
        experts: What a rank has of the experts for SP: ``sharded`` or ``replicated``.
        other_layers: Whether not all layers attend to whole prefixes, as with a sliding window.
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
    description: Decoder | None = None
    quantization: Format | None = None
    experts: str = SHARDED
    other_layers: bool = False

    @property
    def decoder(self) -> Decoder:
        """The matrices of the model."""
        if self.description is not None:
            return self.description
        traits = TRAITS[self.architecture]
        return Decoder(
            self.layer, self.layers, self.vocabulary, self.tied_embeddings,
            qk_norm=traits.qk_norm, qkv_bias=traits.qkv_bias is True,
        )  # fmt: skip

    @property
    def format(self) -> Format:
        """The format of the matrices."""
        return self.quantization or FORMATS[self.weights]

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.decoder.qk_norm

    @property
    def quantized(self) -> bool:
        """Whether the matrices of the layers are quantized."""
        return self.format.quantized

    @property
    def sizes(self) -> ModelSizes:
        """The sizes of the weights and of the KV cache."""
        return ModelSizes.of_decoder(self.decoder, self.format)


def read_model(path: str | Path, context_length: int | None = None, experts: str = SHARDED) -> Model:
    """Read the model of a ``config.json``, or of the folder that has this file.

    Args:
        path: The file or the folder.
        context_length: The value of the server's flag. None means the model's own context.
        experts: What a rank has of the experts for SP: ``sharded`` or ``replicated``.

    Raises:
        ShiftError: there is no such file, or the model is not a decoder whose matrices are known.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        model = _model(file, json.loads(file.read_text()), context_length)
    except KeyError as error:
        raise ShiftError(f"{file} has no {error}; give the config.json of a decoder as --model") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShiftError(f"{file}: {error}; give the config.json of a decoder as --model") from error
    if experts != SHARDED and model.decoder.experts is None:
        raise ShiftError(f"--experts {experts}: {model.name} has no experts; leave it out")
    return replace(model, experts=experts)


def _model(file: Path, raw: Any, context_length: int | None) -> Model:
    if not isinstance(raw, dict):
        raise ValueError("it is not a JSON object")
    architecture, config = architecture_of(raw), with_defaults(raw)
    check_dtype(raw)
    decoder = decoder_of(config)
    context = context_of(config, context_length)
    if architecture in FAMILIES:
        check_fields(config, context)
    name, path = _name(file)
    weights = _weights(file, raw)
    return Model(
        name, decoder.layer, decoder.layers, decoder.vocabulary, context,
        weights.name, decoder.tied_embeddings, architecture, path, context_length is not None, decoder, weights,
        other_layers=has_other_layers(config, architecture),
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


def _weights(file: Path, raw: dict[str, Any]) -> Format:
    """Return the format of the weights. SGLang looks for a quantization in the same places."""
    key = "quantization_config" if raw.get("quantization_config") else "compression_config"
    if not raw.get(key) and file.name == "config.json" and (file.parent / NVIDIA_QUANT_CONFIG).exists():
        raise ValueError(f"{NVIDIA_QUANT_CONFIG} beside it, a quantization for which there are no figures")
    return format_of(raw.get(key), key)
