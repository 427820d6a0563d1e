"""Replace the functions of SGLang's ``layernorm_sp``.

SGLang's LayerNorm sequence parallelism shards the tokens of some batches over its TP group. SGLang's layers take its
path while a step is inside of our region. There :mod:`sglang_shift.layers` does what these functions did.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import current, current_step
from sglang_shift.seams import relies_on, replaces


@replaces(
    "sglang.srt.layers.layernorm_sp:runs_sp",
    "The mode of the step must decide whether the tokens are divided, not the kind of the batch.",
)
@relies_on(
    "sglang.srt.layers.logits_processor:LogitsProcessor.forward",
    "This method leaves the token-sharded region if runs_sp returns True.",
)
def runs_sp(forward_mode: ForwardMode) -> bool:
    """Whether a layer computes this rank's tokens now.

    A step enters the region at the embedding. If it has not, the first layer's boundary asks this function, and then
    calls :func:`sp_entry_scatter`.
    """
    step = current()
    return step is not None and step.sharded and not step.left


@replaces(
    "sglang.srt.layers.layernorm_sp:sp_entry_scatter",
    "The SP index of a rank must select the rank's tokens, not its TP rank.",
)
@relies_on(
    "sglang.srt.layers.layer_boundary.stage:StageBoundary._select",
    "This method enters the token-sharded region before the first layer.",
)
def sp_entry_scatter(hidden_states: torch.Tensor) -> torch.Tensor:
    """Enter the region, unless the embedding has already done that.

    Args:
        hidden_states: ``[T, h]``, equal on every rank. If the embedding kept this rank's tokens, ``[ceil(T / S), h]``.

    Returns:
        ``[ceil(T / S), h]``.
    """
    step = current_step()
    return hidden_states if step.inside else scatter_tokens(step, hidden_states)


@replaces(
    "sglang.srt.layers.layernorm_sp:column_parallel_g_matmul",
    "Our function refuses a linear without a projection. A linear of a layer has a projection.",
)
@relies_on(
    "sglang.srt.layers.linear:ColumnParallelLinear.forward",
    "This method calls column_parallel_g_matmul while sp_active is set.",
)
def column_parallel_g_matmul(linear: Any, input_parallel: torch.Tensor, bias: Any) -> NoReturn:
    """Refuse a column-parallel linear that no SP step knows."""
    _refuse(linear)


@replaces(
    "sglang.srt.layers.layernorm_sp:row_parallel_gbar_matmul",
    "Our function refuses a linear without a projection. A linear of a layer has a projection.",
)
@relies_on(
    "sglang.srt.layers.linear:RowParallelLinear.forward",
    "This method calls row_parallel_gbar_matmul while sp_active is set.",
)
def row_parallel_gbar_matmul(linear: Any, input_: torch.Tensor, bias: Any) -> NoReturn:
    """Refuse a row-parallel linear that no SP step knows."""
    _refuse(linear)


def _refuse(linear: Any) -> NoReturn:
    raise RuntimeError(
        f"{linear} is a parallel linear outside of the decoder's layers, and an SP step has run it; serve this model "
        "without --sp-size and --enable-shift-parallel"
    )
