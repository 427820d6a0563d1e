"""LoRA adapters in SP steps.

If a server has adapters, SGLang wraps the model's layers after it has loaded them. A step with an active adapter runs
in TP (:mod:`sglang_shift.runtime.tp_only`). So in an SP step a wrapper only has to run the layer that it wraps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.lora.layers import BaseLayerWithLoRA, ParallelLMHeadWithLoRA

from sglang_shift.parallel.forwards import Forwards


def wrappers(model: torch.nn.Module) -> list[Any]:
    """The layers of the model that SGLang has wrapped for adapters."""
    return [module for module in model.modules() if isinstance(module, BaseLayerWithLoRA)]


def outermost(model: torch.nn.Module) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Return a function that finds the module that the model calls for a layer: its wrapper, or the layer itself."""
    by_layer = {id(wrapper.base_layer): wrapper for wrapper in wrappers(model)}
    return lambda layer: by_layer.get(id(layer), layer)


def pass_over_adapters(model: torch.nn.Module, forwards: Forwards) -> None:
    """Let SP steps run the wrapped layers, without adapters.

    Args:
        model: A model whose layers SGLang has wrapped.
        forwards: The methods that SP steps run in place of SGLang's. It has those of the wrapped layers.
    """
    for wrapper in wrappers(model):
        of_head = isinstance(wrapper, ParallelLMHeadWithLoRA)
        forwards.replace(wrapper, _logits(wrapper) if of_head else _forward_of(wrapper.base_layer))


def _forward_of(layer: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return layer.forward(*args, **kwargs)  # the forward of this step: SP steps have another one

    return forward


def _logits(head: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    # An LM head of SGLang has no ``forward``.
    return lambda hidden_states: F.linear(hidden_states, head.weight, getattr(head.base_layer, "bias", None))
