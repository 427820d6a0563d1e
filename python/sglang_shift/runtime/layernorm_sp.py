"""Replace the functions of SGLang's ``layernorm_sp`` by more general functions.

SGLang's LayerNorm sequence parallelism shards the tokens of some batches over its TP group. Our functions shard the
tokens of every step that runs in SP, over the step's topology.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_forward

from sglang_shift.parallel.region import exit_gather, scatter_tokens
from sglang_shift.parallel.step import Step, current
from sglang_shift.seams import relies_on, replaces


@replaces("sglang.srt.layers.layernorm_sp:runs_sp", "the mode of the step decides, not the kind of the batch")
def runs_sp(forward_mode: ForwardMode) -> bool:
    """Whether this forward is token-sharded. The step's mode decides that, and not the kind of its batch."""
    step = current()
    return step is not None and step.sharded and not forward_mode.is_idle()


@replaces(
    "sglang.srt.layers.layernorm_sp:sp_entry_scatter", "the tokens of a rank follow its SP index, not its TP rank"
)
@relies_on(
    "sglang.srt.layers.layer_boundary.stage:StageBoundary._select", "it enters the region before the first layer"
)
def sp_entry_scatter(hidden_states: torch.Tensor) -> torch.Tensor:
    """Enter the region: keep only this rank's tokens, unless the embedding has already done that.

    Args:
        hidden_states: ``[T, h]``, equal on every rank. If the embedding kept this rank's tokens, ``[ceil(T / S), h]``.

    Returns:
        ``[ceil(T / S), h]``.
    """
    step = _step()
    return hidden_states if step.scattered_by_embedding else scatter_tokens(step, hidden_states)


@replaces(
    "sglang.srt.layers.layernorm_sp:maybe_exit_gather",
    "gathers over the SP group, and only the rows that the LM head reads",
)
@relies_on("sglang.srt.layers.logits_processor:LogitsProcessor.forward", "it leaves the region before the LM head")
def maybe_exit_gather(
    *,
    hidden_states: torch.Tensor,
    hidden_states_before_norm: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    forward_mode: ForwardMode,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Leave the region.

    Args:
        hidden_states: ``[T_local, h]`` in SP mode. Otherwise ``[T, h]``, and the function returns it unchanged.
        hidden_states_before_norm: The hidden states before the final norm, if the caller wants them.
        input_ids: Unused. The entry has recorded which rows leave.
        forward_mode: SGLang's forward mode of the batch.

    Returns:
        Both hidden states as ``[T, h]``. The rows that the LM head (or a capture) reads have values. The other rows
        are zeros.
    """
    if not runs_sp(forward_mode):
        return hidden_states, hidden_states_before_norm
    step = _step()
    hidden_states = exit_gather(step, hidden_states)
    if hidden_states_before_norm is not None:
        hidden_states_before_norm = exit_gather(step, hidden_states_before_norm)
    get_forward().set("sp_active", False)
    return hidden_states, hidden_states_before_norm


@replaces(
    "sglang.srt.layers.layernorm_sp:column_parallel_g_matmul", "QKV with its exchange, gate_up without communication"
)
@relies_on("sglang.srt.layers.linear:ColumnParallelLinear.forward", "it calls column_parallel_g_matmul while sp_active")
def column_parallel_g_matmul(linear: Any, input_parallel: torch.Tensor, bias: Any) -> torch.Tensor:
    """Compute QKV or gate_up in SP mode.

    ``bias`` is unused, because it is this rank's TP shard. The base weight has its own bias.
    """
    return linear.shift_projection.forward(input_parallel, _step())


@replaces(
    "sglang.srt.layers.layernorm_sp:row_parallel_gbar_matmul",
    "O with its exchange, down; summed over the base-TP group only",
)
@relies_on("sglang.srt.layers.linear:RowParallelLinear.forward", "it calls row_parallel_gbar_matmul while sp_active")
def row_parallel_gbar_matmul(linear: Any, input_: torch.Tensor, bias: Any) -> torch.Tensor:
    """Compute O or down in SP mode.

    ``bias`` is unused, because it follows the rule of full TP: rank 0 adds it. :class:`RowProjection` has the rule of
    SP mode.
    """
    return linear.shift_projection.forward(input_, _step())


def _step() -> Step:
    step = current()
    assert step is not None, "the token-sharded region is entered in a step only"
    return step
