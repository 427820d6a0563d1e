"""The latents of multi-head latent attention (MLA, arXiv 2405.04434) in SP steps.

Each rank keeps the latents of all tokens in its KV cache, in TP and in SP. So the ranks gather the latents of all
tokens, which are far narrower than hidden states. After that, queries and heads are computed as in TP.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from sglang_shift.parallel.region import gather_rows
from sglang_shift.parallel.step import current_step


class GatheredLatents:
    """A computation of latents from this rank's hidden states.

    Args:
        compute: SGLang's method. It returns ``[T_local, n]``, a linear's pair with that, or a tuple of such tensors.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what SGLang's method returns, with the rows of all tokens."""
        step = current_step()
        latents = self.compute(*args, **kwargs)
        step.in_attention = True
        if isinstance(latents, torch.Tensor):
            return gather_rows(step, latents)
        return tuple(each if each is None else gather_rows(step, each) for each in latents)


class GatheredAttention:
    """An attention module that reads hidden states of all tokens, for MLA that has no method for its latents.

    Args:
        attention: SGLang's module. Its ``forward`` has an argument ``hidden_states``.
    """

    def __init__(self, attention: torch.nn.Module) -> None:
        self.attention = attention
        self.signature = inspect.signature(attention.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Gather the hidden states, ``[T_local, h]`` to ``[T, h]``, and run SGLang's module."""
        step = current_step()
        arguments = self.signature.bind(*args, **kwargs)
        arguments.arguments["hidden_states"] = gather_rows(step, arguments.arguments["hidden_states"])
        step.in_attention = True
        return type(self.attention).forward(self.attention, *arguments.args, **arguments.kwargs)
