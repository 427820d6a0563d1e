"""Routed experts in SP steps. TP ranks divide each expert, so every rank computes its part for all tokens.

The ranks gather the rows before the router chooses experts, and sum the parts of each rank's own rows afterwards. Both
together send what the all-reduce of a TP step sends.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_shift.parallel.region import gather_rows, sum_rows
from sglang_shift.parallel.step import current_step


class Router:
    """SGLang's ``TopK``. It sees all tokens, as in TP: so its result has the form that the experts expect.

    Args:
        top_k: SGLang's ``TopK``.
    """

    def __init__(self, top_k: Any) -> None:
        self.top_k = top_k
        self.stock = top_k.forward

    def __call__(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``[T_local, h]`` and ``[T_local, experts]`` to the choice of all T tokens."""
        step = current_step()
        logits = gather_rows(step, router_logits)
        return self.stock(gather_rows(step, hidden_states), logits, *args, **kwargs)


class Experts:
    """SGLang's ``FusedMoE``, or a subclass of it.

    Args:
        experts: SGLang's module.
    """

    def __init__(self, experts: Any) -> None:
        self.experts = experts

    def __call__(self, hidden_states: torch.Tensor, topk_output: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[T_local, h]`` and the choice of all tokens to ``[T_local, h]``."""
        step = current_step()
        rows = gather_rows(step, hidden_states)
        partial = type(self.experts).forward(self.experts, rows, topk_output, *args, **kwargs)
        return sum_rows(step, partial)
