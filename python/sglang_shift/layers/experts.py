"""Routed experts in SP steps. There are two ways, and ``--shift-experts`` chooses one.

- ``sharded``: TP ranks divide each expert, so every rank computes its part for all tokens. The ranks gather the rows
  before the router chooses experts, and sum the parts of each rank's own rows afterwards. Both together send what the
  all-reduce of a TP step sends.
- ``replicated``: each rank also has the parts of the other ranks of its SP group. It computes its own tokens, and the
  ranks send nothing. The experts take S times the memory.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_shift.errors import ShiftError
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.region import gather_rows, sum_rows
from sglang_shift.parallel.step import current_step
from sglang_shift.seams import relies_on
from sglang_shift.weights.stacked import StackedShards


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
        step.gathered = None  # SGLang's experts may write into their input
        partial = type(self.experts).forward(self.experts, rows, topk_output, *args, **kwargs)
        return sum_rows(step, partial)


class ReplicatedExperts:
    """SGLang's ``FusedMoE`` with the experts' parts of all ranks of the SP group.

    Args:
        experts: SGLang's module.
        shards: The parts.
    """

    def __init__(self, experts: Any, shards: StackedShards) -> None:
        self.experts = experts
        self.shards = shards

    def __call__(self, hidden_states: torch.Tensor, topk_output: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[T_local, h]`` and the choice of this rank's tokens to ``[T_local, h]``."""

        def run() -> torch.Tensor:
            rows = hidden_states.clone()  # SGLang's experts may write into their input
            out: torch.Tensor = type(self.experts).forward(self.experts, rows, topk_output, *args, **kwargs)
            return out

        parts = self.shards.each_shard(run)
        total = next(parts)
        for part in parts:
            total = total + part
        return current_step().topology.base_all_reduce(total)


@relies_on(
    "sglang.srt.models.deepseek_v2:DeepseekV2MoE.forward_normal_dual_stream",
    "While a CUDA graph is captured, this method asks its experts whether they can leave their sums to a later kernel.",
)
def sum_at_once(experts: Any, forwards: Forwards) -> None:
    """Let experts that can leave the sum over the chosen experts to a later kernel sum it themselves in SP steps.

    Otherwise SGLang's blocks would not call ``forward`` of the experts, which has our function in SP steps.
    """
    if getattr(experts, "supports_deferred_finalize", False):
        forwards.replace(experts, False, "supports_deferred_finalize")
        forwards.replace(experts, _leave_no_sum, "forward_deferred_finalize")


def _leave_no_sum(*args: Any, **kwargs: Any) -> Any:
    raise ShiftError(
        "the model leaves the sum over the experts of a token to a later kernel, which SP steps do not have; serve it "
        "without --sp-size and --enable-shift-parallel, or with another --moe-runner-backend"
    )
