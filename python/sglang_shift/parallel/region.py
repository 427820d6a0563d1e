"""Enters and leaves the token-sharded region.

In an SP step, each rank carries 1/S of the tokens from the output of the embedding to the final norm.
"""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.parallel.step import ExitPlan, Step
from sglang_shift.parallel.topology import Topology
from sglang_shift.seams import relies_on


def enter(step: Step, num_tokens: int, device: torch.device) -> None:
    """Enter the region: record the tokens of a step, and plan its exit before the first layer starts.

    The batch alone decides which rows leave. After the layers, the copy of these indices to a GPU would have to wait
    for the layers, and would delay the next step.

    Args:
        step: The step that enters the region.
        num_tokens: Rows that enter the region, with rows that pad the step to the size of a graph.
        device: The device of the layers.
    """
    step.num_tokens = num_tokens
    step.exit_plan = plan_exit(rows_read(step.batch), num_tokens, step.topology, device) if step.has_exit else None
    step.enter()


def scatter_tokens(step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
    """Enter the region, and keep only this rank's tokens.

    Args:
        step: The step that enters the region.
        hidden_states: ``[T, h]``, equal on every rank.

    Returns:
        ``[ceil(T / S), h]``: the rows from ``sp_index * ceil(T / S)`` on. Rows beyond T are zeros.
    """
    enter(step, hidden_states.shape[0], hidden_states.device)
    return local_rows(step, hidden_states)


def local_rows(step: Step, rows: torch.Tensor) -> torch.Tensor:
    """Keep this rank's rows of ``rows``, ``[T, ...]``. Rows beyond T are zeros."""
    local = padded_local_tokens(step.num_tokens, step.topology.layout.sp_size)
    start = step.topology.sp_index * local
    return pad_rows(rows[start : start + local], local).contiguous()


def sum_rows(step: Step, partial: torch.Tensor) -> torch.Tensor:
    """Sum the rows of this rank's tokens over all P ranks. Each rank has a part of the sum for all tokens.

    In SP mode a rank only needs the sum for its own tokens. An all-to-all over the SP group with a local sum sends half
    as many bytes as an all-reduce. A reduce-scatter would not help with gloo, because gloo runs an all-reduce for it.

    Args:
        step: The step, inside of the region.
        partial: ``[T, h]``, this rank's part of the sum.

    Returns:
        ``[ceil(T / S), h]``: the rows that :func:`local_rows` would keep of the sum.
    """
    topology = step.topology
    received = topology.exchange.all_to_all(kernels.pack_tokens(partial, topology.layout.sp_size))
    return topology.base_all_reduce(received.sum(0))


def gather_rows(step: Step, local: torch.Tensor) -> torch.Tensor:
    """All-gather this rank's rows, ``[T_local, ...]``, over the SP group. Return all rows, ``[T, ...]``.

    If the last call gathered the same tensor, this call returns the same rows again: a router and its experts, for
    example, read the same rows.
    """
    if step.gathered is not None and step.gathered[0] is local:
        return step.gathered[1]
    full = local.new_empty((step.topology.layout.sp_size * local.shape[0], *local.shape[1:]))
    step.topology.sp_group.all_gather_into_tensor(full, local.contiguous())
    full = full[: step.num_tokens]
    step.gathered = (local, full)
    return full


def pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Pad ``x``, ``[n, ...]``, with zeros to ``rows`` rows. If it has ``rows`` rows, return ``x`` itself."""
    return x if x.shape[0] == rows else F.pad(x, (*(0, 0) * (x.dim() - 1), 0, rows - x.shape[0]))


@relies_on(
    "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states",
    "This method decides which rows the LM head reads.",
)
def rows_read(batch: ForwardBatch) -> torch.Tensor | None:
    """The rows of a prefill that ``LogitsProcessor._get_pruned_states`` reads; None means all rows.

    These are the last row of each request. If the batch returns logprobs of its input, these are all rows of a request
    from its ``extend_logprob_start_len`` on. At least one row is among them: a chunk that only samples reads its last
    row.

    Returns:
        Row numbers in ascending order, int64, on the CPU.
    """
    mode = batch.forward_mode
    if (
        not mode.is_extend()
        or mode.is_target_verify()
        or mode.is_draft_extend_v2()
        or mode.is_dllm_extend()
        or batch.capture_hidden_mode not in (None, CaptureHiddenMode.NULL)
        or batch.is_prefill_only
        or batch.extend_seq_lens_cpu is None
    ):
        return None
    lengths = torch.as_tensor(batch.extend_seq_lens_cpu, dtype=torch.int64)
    ends = lengths.cumsum(0)
    if not batch.return_logprob:
        return ends - 1
    starts = torch.as_tensor(batch.extend_logprob_start_lens_cpu, dtype=torch.int64)
    counts = lengths - starts.minimum(lengths - 1)
    # A row has the same distance to the last row of its request in the step and in the result.
    return torch.arange(int(counts.sum())) + (ends - counts.cumsum(0)).repeat_interleave(counts)


def plan_exit(rows: torch.Tensor | None, num_tokens: int, topology: Topology, device: torch.device) -> ExitPlan | None:
    """Plan how ``rows`` leave the region.

    Args:
        rows: The rows that leave, as sorted numbers from 0 to T - 1, equal on every rank, on the CPU; None for all.
        num_tokens: T, with rows that pad the step to the size of a graph.
        topology: The topology of the step.
        device: The device of the rows.

    Returns:
        The plan, or None if every rank sends all its rows.
    """
    if rows is None:
        return None
    size, me = topology.layout.sp_size, topology.sp_index
    width = padded_local_tokens(num_tokens, size)
    owners = rows // width
    counts = owners.bincount(minlength=size)
    rows_per_rank = int(counts.max())
    if rows_per_rank == width:
        return None
    firsts = counts.cumsum(0) - counts
    places = torch.arange(len(rows)) + (torch.arange(size) * rows_per_rank - firsts)[owners]
    local_rows = rows[owners == me] - me * width
    indices = copy_to_device(torch.cat((local_rows, rows, places)), device)  # the one copy to the device
    return ExitPlan(rows_per_rank, *indices.split((len(local_rows), len(rows), len(rows))))


def copy_to_device(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``indices`` from the CPU to ``device``. For a GPU the copy is asynchronous, in the order of its stream."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def exit_gather(step: Step, local: torch.Tensor) -> torch.Tensor:
    """All-gather the rows that leave the region, over the SP group.

    Args:
        step: It has the plan of the exit.
        local: ``[T_local, h]``, this rank's rows.

    Returns:
        ``[T, h]``: the rows that leave, in their places. All other rows are zeros.
    """
    size, group, plan = step.topology.layout.sp_size, step.topology.sp_group, step.exit_plan
    if plan is None:
        return gather_rows(step, local)
    sent = local.new_zeros((plan.rows_per_rank, *local.shape[1:]))
    sent[: len(plan.local_rows)] = local[plan.local_rows]
    received = local.new_empty((size * plan.rows_per_rank, *local.shape[1:]))
    group.all_gather_into_tensor(received, sent)
    out = local.new_zeros((step.num_tokens, *local.shape[1:]))
    out[plan.rows] = received[plan.places]
    return out
