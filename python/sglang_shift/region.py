"""The token-sharded region of a step: its entry, its exit, and whether a step has one.

In SP mode each rank carries 1/S of the step's tokens from the embedding's output to the final norm.
The functions named in :mod:`sglang_shift.seams` replace those of SGLang's ``layernorm_sp``, whose
seam (LayerNorm sequence parallelism) this one generalizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_forward

from sglang_shift.modes import Mode
from sglang_shift.parallel import SequenceParallel


@dataclass
class Region:
    """The region of the forward that is running. One per process: a rank runs one forward at a time.

    Attributes:
        parallel: The groups; None until the model is loaded.
        batch: The forward batch of the SP step that is running; None outside of one.
        num_tokens: Its tokens before padding, set at the entry.
    """

    parallel: SequenceParallel | None = None
    batch: ForwardBatch | None = None
    num_tokens: int = 0

    @contextmanager
    def step(self, mode: Mode, batch: ForwardBatch) -> Iterator[None]:
        """Run one forward in ``mode``. Forwards outside of any ``step`` are TP."""
        get_forward().set("sp_active", False)
        self.batch = batch if mode is Mode.SP else None
        try:
            yield
        finally:
            self.batch = None
            get_forward().set("sp_active", False)

    @property
    def groups(self) -> SequenceParallel:
        """The groups, which exist whenever a region does."""
        assert self.parallel is not None, "an SP step before the model was loaded"
        return self.parallel


region = Region()


def runs_sp(forward_mode: ForwardMode) -> bool:
    """Whether this forward is token-sharded (replaces ``layernorm_sp.runs_sp``)."""
    return region.batch is not None and not forward_mode.is_idle()


def padded_local_tokens(num_tokens: int, sp_size: int) -> int:
    """Rows each rank carries: ``ceil(num_tokens / S)``; the last ranks' may be padding."""
    return -(-num_tokens // sp_size)


def sp_entry_scatter(hidden_states: torch.Tensor) -> torch.Tensor:
    """Keep this rank's tokens (replaces ``layernorm_sp.sp_entry_scatter``).

    Args:
        hidden_states: ``[T, h]``, the same on every rank.

    Returns:
        ``[ceil(T / S), h]``: rows ``sp_index * ceil(T / S)`` onwards, zeros where there are none.
    """
    groups = region.groups
    region.num_tokens = hidden_states.shape[0]
    local = padded_local_tokens(region.num_tokens, groups.layout.sp_size)
    start = groups.sp_index * local
    rows = hidden_states[start : start + local]
    return F.pad(rows, (0, 0, 0, local - rows.shape[0])).contiguous()


def maybe_exit_gather(
    *,
    hidden_states: torch.Tensor,
    hidden_states_before_norm: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    forward_mode: ForwardMode,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Leave the region (replaces ``layernorm_sp.maybe_exit_gather``).

    Args:
        hidden_states: ``[T_local, h]`` in SP mode, else ``[T, h]``, returned as it is.
        hidden_states_before_norm: The same, before the final norm, where the caller wants it.
        input_ids: Unused: the entry recorded the token count.
        forward_mode: The batch's mode.

    Returns:
        ``[T, h]`` with the rows that the LM head (or a capture) reads; the others are zeros.
    """
    if not runs_sp(forward_mode):
        return hidden_states, hidden_states_before_norm
    assert region.batch is not None
    rows = rows_read(region.batch)
    hidden_states = exit_gather(hidden_states, rows)
    if hidden_states_before_norm is not None:
        hidden_states_before_norm = exit_gather(hidden_states_before_norm, rows)
    get_forward().set("sp_active", False)
    return hidden_states, hidden_states_before_norm


def rows_read(batch: ForwardBatch) -> list[int] | None:
    """The rows of a prefill that ``LogitsProcessor._get_pruned_states`` reads; None means all.

    The last row of each request, or with input logprobs those from its ``extend_logprob_start_len``
    on (and never none: a chunk that only samples reads its last row).
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
    lengths = [int(n) for n in batch.extend_seq_lens_cpu]
    if batch.return_logprob:
        firsts = [min(int(s), n - 1) for s, n in zip(batch.extend_logprob_start_lens_cpu, lengths, strict=True)]
    else:
        firsts = [n - 1 for n in lengths]
    rows: list[int] = []
    offset = 0
    for first, length in zip(firsts, lengths, strict=True):
        rows.extend(range(offset + first, offset + length))
        offset += length
    return rows


def exit_gather(local: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """All-gather the wanted rows over the SP group.

    Each rank sends as many rows as the rank with the most wanted ones (an all-gather has equal
    parts), but never more than all of its rows.

    Args:
        local: ``[T_local, h]``.
        rows: Sorted wanted rows of the step's T, the same on every rank; None for all.

    Returns:
        ``[T, h]``: the wanted rows in their places, zeros elsewhere.
    """
    groups, total, width = region.groups, region.num_tokens, local.shape[0]
    size, me = groups.layout.sp_size, groups.sp_index
    owned = [[r for r in rows if r // width == k] for k in range(size)] if rows is not None else None
    most = width if owned is None else max(map(len, owned))
    if owned is None or most == width:
        full = local.new_empty((size * width, *local.shape[1:]))
        groups.sp_group.all_gather_into_tensor(full, local.contiguous())
        return full[:total]
    sent = local.new_zeros((most, *local.shape[1:]))
    if owned[me]:
        sent[: len(owned[me])] = local[_indices([r - me * width for r in owned[me]], local)]
    received = local.new_empty((size * most, *local.shape[1:]))
    groups.sp_group.all_gather_into_tensor(received, sent)
    places = [k * most + i for k, mine in enumerate(owned) for i in range(len(mine))]
    out = local.new_zeros((total, *local.shape[1:]))
    out[_indices([r for mine in owned for r in mine], local)] = received[_indices(places, local)]
    return out


def _indices(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
