"""Which models have a layer that does not attend to all tokens before, with their keys in the KV cache."""

from __future__ import annotations

from typing import Any

from sglang_shift.models.decoder_config import text_config_of
from sglang_shift.models.families import FAMILIES


def other_layers(model_config: Any, name: str) -> str | None:
    """Why not all layers of a model attend to whole prefixes, as a clause, or None if all do.

    Args:
        model_config: SGLang's configuration of the model.
        name: The name of its architecture.
    """
    if getattr(model_config, "is_encoder_decoder", False):
        return "its decoder reads the keys of an encoder"
    if name in FAMILIES:
        return None  # no class of these applies a window
    kinds = set(getattr(text_config_of(model_config.hf_config), "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"it has layers of type {' and '.join(sorted(map(str, kinds)))}"
    if getattr(model_config, "is_hybrid_swa", False):
        return "it has layers with a sliding window"
    return None
