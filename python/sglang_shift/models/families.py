"""Lists the model families that are served. Each family has one record, from which everything else about it follows.

To add a family, add its record to :data:`FAMILIES`, and a tiny model of it to ``test/support/families.py``. The tests
compare each record with SGLang's class and with transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from sglang_shift.errors import Refusal

PACKAGE = "sglang.srt.models."
ORIGINAL_LENGTH = "original_max_position_embeddings"
PARTIAL_ROTARY = "partial_rotary_factor"

WITH_IMAGES = (
    "Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
"""Architectures outside of the families whose answers about images are tested in both modes."""


class Role(StrEnum):
    """The task of a linear in a decoder layer."""

    QKV = "qkv"
    OUTPUT = "o"
    GATE_UP = "gate_up"
    DOWN = "down"

    @property
    def row_parallel(self) -> bool:
        """Whether ranks divide the inputs and sum the products; otherwise ranks divide the outputs."""
        return self in (Role.OUTPUT, Role.DOWN)


@dataclass(frozen=True)
class Linear:
    """A linear of each decoder layer in SGLang's class.

    Attributes:
        name: Its name inside the layer.
        role: Its task.
        bias: Whether it has a bias, or the name of the field of ``config.json`` that decides this.
    """

    name: str
    role: Role
    bias: bool | str = False

    def has_bias(self, hf_config: Any) -> bool:
        """Return whether it has a bias in the model of a Hugging Face configuration."""
        return self.bias if isinstance(self.bias, bool) else bool(getattr(hf_config, self.bias, False))


class Window(Enum):
    """The layers to which transformers applies ``sliding_window``. SGLang's classes apply it to no layer."""

    NONE = "no layer"
    ALL = "every layer"
    SLIDING = "the layers of type `sliding_attention`"


@dataclass(frozen=True)
class Family:
    """A family of dense decoders that keep to SGLang's layer boundaries.

    Attributes:
        title: Its name in a text.
        architecture: Its name in ``architectures`` of a ``config.json``.
        native: SGLang's class, ``module:name``, in :data:`PACKAGE`.
        model_type: Its ``model_type`` in transformers.
        linears: The linears of each decoder layer.
        window: The layers to which transformers applies a sliding window.
        qk_norm: Whether the queries and keys of each head are normalized.
        rope_fields: Parameters of the rope that SGLang reads beside ``rope_parameters``, and not only among them.
    """

    title: str
    architecture: str
    native: str
    model_type: str
    linears: tuple[Linear, ...]
    window: Window
    qk_norm: bool = False
    rope_fields: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """SGLang's module of the class, in :data:`PACKAGE`."""
        return self.native.partition(":")[0]

    @property
    def bias_fields(self) -> frozenset[str]:
        """Fields of ``config.json`` that decide which linears have a bias."""
        return frozenset(linear.bias for linear in self.linears if isinstance(linear.bias, str))


def _dense(qkv_bias: bool | str = False, output_bias: bool | str = False) -> tuple[Linear, ...]:
    """Return the linears of a dense layer: of attention, then of a gated MLP. SGLang's classes have no MLP biases."""
    return (
        Linear("self_attn.qkv_proj", Role.QKV, qkv_bias),
        Linear("self_attn.o_proj", Role.OUTPUT, output_bias),
        Linear("mlp.gate_up_proj", Role.GATE_UP),
        Linear("mlp.down_proj", Role.DOWN),
    )


_BY_FIELD = _dense("attention_bias", "attention_bias")

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "Llama", "LlamaForCausalLM", "llama:LlamaForCausalLM", "llama", _BY_FIELD, Window.NONE,
            rope_fields=(ORIGINAL_LENGTH,),
        ),
        Family(
            "Mistral", "MistralForCausalLM", "mistral:MistralForCausalLM", "mistral", _dense(), Window.ALL,
            rope_fields=(ORIGINAL_LENGTH,),
        ),
        Family(
            "Phi-3", "Phi3ForCausalLM", "llama:Phi3ForCausalLM", "phi3", _dense(), Window.ALL,
            rope_fields=(ORIGINAL_LENGTH, PARTIAL_ROTARY),
        ),
        Family(
            "Qwen2", "Qwen2ForCausalLM", "qwen2:Qwen2ForCausalLM", "qwen2", _dense(qkv_bias=True), Window.SLIDING,
        ),
        Family(
            "Qwen3", "Qwen3ForCausalLM", "qwen3:Qwen3ForCausalLM", "qwen3", _BY_FIELD, Window.SLIDING, qk_norm=True,
        ),
    )
}  # fmt: skip
"""The families by architecture. Tests compare every mode of each family with transformers."""


def family_of(model: Any) -> Family | None:
    """Return the family of a loaded model by its class in SGLang, or None."""
    return next((family for family in FAMILIES.values() if PACKAGE + family.native == _class_of(model)), None)


OTHER_CLASS = Refusal(
    "SGLang loaded {other_class} for architecture {name}, and sequence parallelism is tested with {native_class}; "
    "remove what replaces it (SGLANG_EXTERNAL_MODEL_PACKAGE, SGLANG_DISABLED_MODEL_ARCHS), or serve without sequence "
    "parallelism",
    "A rank checks this after loading. SGLang takes transformers' code for a class that it cannot import, and a "
    "package of the user's may replace a class.",
)


TRANSFORMERS_CLASSES = PACKAGE + "transformers"
NO_CLASS = Refusal(
    "SGLang serves architecture {name} by transformers' code ({other_class}), which SP mode cannot divide; serve this "
    "model without --sp-size and --enable-shift-parallel",
    "A rank checks this after loading. SGLang has no class of its own for the architecture.",
)


def check_class(model: Any, name: str) -> None:
    """Check that SGLang loaded its own class for the architecture.

    If SGLang lacks a class or cannot import its module, it silently takes transformers' code. A package of the user's
    may also register a class of that name.

    Args:
        model: The loaded model.
        name: The architecture.

    Raises:
        Refused: the model has transformers' code, or its family has another class of SGLang's.
    """
    loaded = _class_of(model)
    if loaded.startswith(TRANSFORMERS_CLASSES):
        raise NO_CLASS(other_class=loaded, name=name)
    if name in FAMILIES and loaded != (native := PACKAGE + FAMILIES[name].native):
        raise OTHER_CLASS(other_class=loaded, name=name, native_class=native)


def _class_of(model: Any) -> str:
    return f"{type(model).__module__}:{type(model).__qualname__}"
