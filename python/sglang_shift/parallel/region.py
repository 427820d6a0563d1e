"""The token-sharded region of a step: its entry and its exit.

In SP mode each rank carries 1/S of the step's tokens from the embedding's output to the final norm.
"""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.parallel.step import Exit, Step
from sglang_shift.parallel.topology import Topology
from sglang_shift.seams import relies_on


def enter(step: Step, num_tokens: int, device: torch.device) -> None:
    """Note the step's tokens, and have the way out ready before the first layer is started.

    Which rows leave depends on the batch only. A copy to a GPU behind the layers would be waited
    for until they are done, and with it the next step.

    Args:
        step: The step that enters.
        num_tokens: Rows that enter the region, those that pad them to a graph's size included.
        device: Where the layers run.
    """
    step.num_tokens = num_tokens
    step.exit = plan_exit(rows_read(step.batch), num_tokens, step.topology, device) if step.exits else None


def scatter_tokens(step: Step, hidden_states: torch.Tensor) -> torch.Tensor:
    """Enter, and keep this rank's tokens.

    Args:
        step: The step that enters.
        hidden_states: ``[T, h]``, the same on every rank.

    Returns:
        ``[ceil(T / S), h]``: rows ``sp_index * ceil(T / S)`` onwards, zeros if there are none.
    """
    enter(step, hidden_states.shape[0], hidden_states.device)
    local = padded_local_tokens(step.num_tokens, step.topology.layout.sp_size)
    start = step.topology.sp_index * local
    return padded(hidden_states[start : start + local], local).contiguous()


def scatter_sum(step: Step, partial: torch.Tensor) -> torch.Tensor:
    """Enter with the rows that SGLang's embedding looked up, and keep the sum of this rank's tokens.

    Every rank has looked up its part of the vocabulary for all tokens: a token's row comes from one
    rank, and is zero on all others. In SP mode each rank needs the sum for its own tokens only. An
    all-to-all over the SP group and a local sum send half of what an all-reduce does; gloo's
    reduce-scatter is no way to it, as it is an all-reduce inside. The sum is exact in any order.

    Args:
        step: The step that enters.
        partial: ``[T, h]``: this rank's part of the sum.

    Returns:
        ``[ceil(T / S), h]``: what :func:`scatter_tokens` would keep of the sum.
    """
    enter(step, partial.shape[0], partial.device)
    step.entered = True
    topology = step.topology
    received = topology.exchange.all_to_all(kernels.pack_tokens(partial, topology.layout.sp_size))
    return topology.base_all_reduce(received.sum(0))


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[n, h]`` with zeros up to ``rows`` rows; ``x`` itself where it has them."""
    return x if x.shape[0] == rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


@relies_on(
    "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states", "it says which rows the LM head reads"
)
def rows_read(batch: ForwardBatch) -> torch.Tensor | None:
    """The rows of a prefill that ``LogitsProcessor._get_pruned_states`` reads; None means all.

    The last row of each request, or with input logprobs those from its ``extend_logprob_start_len``
    on (and never none: a chunk that only samples reads its last row). In order, int64, on the CPU.
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
    # A row lies as far before its request's end in the step as before that request's end in the result.
    return torch.arange(int(counts.sum())) + (ends - counts.cumsum(0)).repeat_interleave(counts)


def plan_exit(rows: torch.Tensor | None, num_tokens: int, topology: Topology, device: torch.device) -> Exit | None:
    """How ``rows`` leave the region.

    Args:
        rows: Sorted wanted rows of the step's T, the same on every rank, on the CPU; None for all.
        num_tokens: T, with the rows that pad it to a graph's size.
        topology: Of the step.
        device: Where the rows are.

    Returns:
        None where a rank sends all that it carries.
    """
    if rows is None:
        return None
    size, me = topology.layout.sp_size, topology.sp_index
    width = padded_local_tokens(num_tokens, size)
    owners = rows // width
    counts = owners.bincount(minlength=size)
    most = int(counts.max())
    if most == width:
        return None
    firsts = counts.cumsum(0) - counts
    places = torch.arange(len(rows)) + (torch.arange(size) * most - firsts)[owners]
    mine = rows[owners == me] - me * width
    indices = on_device(torch.cat((mine, rows, places)), device)  # the one copy to the device
    return Exit(most, *indices.split((len(mine), len(rows), len(rows))))


def on_device(indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``indices``, which are on the CPU, on ``device``; a GPU copies them when its stream gets there."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def exit_gather(step: Step, local: torch.Tensor) -> torch.Tensor:
    """All-gather the wanted rows over the SP group.

    Args:
        step: Which rows are wanted, and how they leave.
        local: ``[T_local, h]``.

    Returns:
        ``[T, h]``: the wanted rows in their places, zeros elsewhere.
    """
    size, group, way = step.topology.layout.sp_size, step.topology.sp_group, step.exit
    if way is None:
        full = local.new_empty((size * local.shape[0], *local.shape[1:]))
        group.all_gather_into_tensor(full, local.contiguous())
        return full[: step.num_tokens]
    sent = local.new_zeros((way.most, *local.shape[1:]))
    sent[: len(way.mine)] = local[way.mine]
    received = local.new_empty((size * way.most, *local.shape[1:]))
    group.all_gather_into_tensor(received, sent)
    out = local.new_zeros((step.num_tokens, *local.shape[1:]))
    out[way.rows] = received[way.places]
    return out
