"""The sums of TP in SP steps.

Inside of the region and outside of attention, a rank has complete rows: the linears and the experts have summed them.
So a TP all-reduce of a model's own code there has nothing to add. Between the two exchanges of a layer, a rank has its
heads of all tokens as in TP, and an all-reduce means what it means in TP.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator

from sglang_shift.parallel.step import current_step


class SumOfCompleteRows:
    """The all-reduce of one of SGLang's groups in SP steps.

    Args:
        group: SGLang's group.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return ``x`` itself if its rows are complete, otherwise SGLang's sum of ``x`` over the group."""
        step = current_step()
        if step.inside and not step.in_attention:
            return x
        return GroupCoordinator.all_reduce(self.group, x, *args, **kwargs)
