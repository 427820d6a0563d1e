"""A model as its ``config.json`` describes it: what step times and memory are computed from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_shift.decoder_layer import Layer, layer_of
from sglang_shift.errors import ShiftError
from sglang_shift.refusals import ARCHITECTURES


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
    """

    name: str
    layer: Layer
    layers: int
    vocabulary: int
    context: int
    weights: str = "bfloat16"
    tied: bool = False
    architecture: str = "LlamaForCausalLM"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.architecture == "Qwen3ForCausalLM"

    @property
    def quantized(self) -> bool:
        """Whether the layers' inputs are quantized, each before its matrix."""
        return self.weights != "bfloat16"

    @property
    def config(self) -> SimpleNamespace:
        """The names of Hugging Face's configurations, for :mod:`sglang_shift.sizing`."""
        return SimpleNamespace(
            architectures=[self.architecture], hidden_size=self.layer.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.layer.intermediate, num_attention_heads=self.layer.heads,
            num_key_value_heads=self.layer.kv_heads, head_dim=self.layer.head_dim, vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )  # fmt: skip


def read_model(path: str | Path) -> Model:
    """The model of a ``config.json``, or of the folder that has one.

    Raises:
        ShiftError: there is none, or it is not a dense decoder that is served here.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(file.read_text())
        return _model(file.absolute().parent.name, config)
    except KeyError as error:
        raise ShiftError(f"{file} has no {error}; give the config.json of a dense decoder as --model") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ShiftError(f"{file}: {error}; give the config.json of a dense decoder as --model") from error


def _model(name: str, config: dict[str, Any]) -> Model:
    layer, dtype = layer_of(config)
    if dtype == "float32":
        raise ValueError("dtype float32, for which there are no figures")
    architecture = config["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{architecture}, which is none of {', '.join(ARCHITECTURES)}")
    return Model(
        name, layer, config["num_hidden_layers"], config["vocab_size"], config["max_position_embeddings"],
        _weights(config.get("quantization_config")), bool(config.get("tie_word_embeddings", False)), architecture,
    )  # fmt: skip


def _weights(quantization: dict[str, Any] | None) -> str:
    if not quantization:
        return "bfloat16"
    method = quantization.get("quant_method")
    if method == "fp8":
        return "fp8_block" if quantization.get("weight_block_size") else "fp8"
    if method == "compressed-tensors" and quantization.get("format") == "float-quantized":
        return "fp8"
    raise ValueError(f"quantization {method}, for which there are no figures")
