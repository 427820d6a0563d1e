"""The token-sharded region of a step: its entry, its exit, and whether a step has one.

In SP mode each rank carries 1/S of the step's tokens from the embedding's output to the final norm.
The functions named in :mod:`sglang_shift.seams.registry` replace those of SGLang's ``layernorm_sp``, whose
seam (LayerNorm sequence parallelism) this one generalizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import sglang_shift_kernels as kernels
import torch
import torch.nn.functional as F
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_forward

from sglang_shift.modes import Mode
from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.parallel.topology import SequenceParallel
from sglang_shift.seams import relies_on, replaces


@dataclass(frozen=True)
class Exit:
    """Which rows leave the region, and their way through the all-gather. All indices are on the device.

    Attributes:
        most: Rows that each rank sends: as many as the rank with the most wanted ones, as an
            all-gather has equal parts.
        mine: This rank's wanted rows, ``most`` or fewer, counted from its first row.
        rows: All wanted rows, of the step's T.
        places: Where each of ``rows`` is in what the all-gather receives.
    """

    most: int
    mine: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class Region:
    """The region of the forward that is running. One per process: a rank runs one forward at a time.

    Attributes:
        parallel: The groups; None until the model is loaded.
        batch: The forward batch of the SP step that is running; None outside of one.
        num_tokens: Its tokens before padding, set at the entry.
        embedded: Whether the embedding already kept this rank's tokens only.
        exits: Whether the exit is in this forward, too; False for a graph of the layers alone.
        exit: How rows leave, set at the entry; None where all do.
    """

    parallel: SequenceParallel | None = None
    batch: ForwardBatch | None = None
    num_tokens: int = 0
    embedded: bool = False
    exits: bool = True
    exit: Exit | None = None

    @contextmanager
    def step(self, mode: Mode, batch: ForwardBatch, exits: bool = True) -> Iterator[None]:
        """Run one forward in ``mode``. Forwards outside of any ``step`` are TP."""
        get_forward().set("sp_active", False)
        self.batch = batch if mode is Mode.SP else None
        self.embedded, self.exits, self.exit = False, exits, None
        try:
            yield
        finally:
            self.batch = self.exit = None
            get_forward().set("sp_active", False)

    def enter(self, num_tokens: int, device: torch.device) -> None:
        """Note the step's tokens, and have the way out ready before the first layer is started.

        Which rows leave depends on the batch only. A copy to a GPU behind the layers would be waited
        for until they are done, and with it the next step.

        Args:
            num_tokens: Rows that enter the region, those that pad them to a graph's size included.
            device: Where the layers run.
        """
        self.num_tokens = num_tokens
        if self.batch is not None and self.exits:
            self.exit = plan_exit(rows_read(self.batch), num_tokens, device)

    @property
    def groups(self) -> SequenceParallel:
        """The groups, which exist whenever a region does."""
        assert self.parallel is not None, "an SP step before the model was loaded"
        return self.parallel


region = Region()


@replaces("sglang.srt.layers.layernorm_sp:runs_sp", "the mode of the step decides, not the kind of the batch")
def runs_sp(forward_mode: ForwardMode) -> bool:
    """Whether this forward is token-sharded (replaces ``layernorm_sp.runs_sp``)."""
    return region.batch is not None and not forward_mode.is_idle()


@replaces(
    "sglang.srt.layers.layernorm_sp:sp_entry_scatter", "the tokens of a rank follow its SP index, not its TP rank"
)
@relies_on(
    "sglang.srt.layers.layer_boundary.stage:StageBoundary._select", "it enters the region before the first layer"
)
def sp_entry_scatter(hidden_states: torch.Tensor) -> torch.Tensor:
    """Keep this rank's tokens (replaces ``layernorm_sp.sp_entry_scatter``).

    Args:
        hidden_states: ``[T, h]``, the same on every rank; returned as it is where it comes from
            :func:`reduce_embedding`, which kept these rows only.

    Returns:
        ``[ceil(T / S), h]``: rows ``sp_index * ceil(T / S)`` onwards, zeros where there are none.
    """
    if region.embedded:
        return hidden_states
    groups = region.groups
    region.enter(hidden_states.shape[0], hidden_states.device)
    local = padded_local_tokens(region.num_tokens, groups.layout.sp_size)
    start = groups.sp_index * local
    return padded(hidden_states[start : start + local], local).contiguous()


@replaces(
    "sglang.srt.layers.vocab_parallel_embedding:tensor_model_parallel_all_reduce",
    "each rank completes the rows of its own tokens only",
)
@relies_on(
    "sglang.srt.layers.vocab_parallel_embedding:VocabParallelEmbedding.forward",
    "it sums its rows by that function alone",
)
@relies_on(
    "sglang.srt.model_executor.model_runner:ModelRunner._extend_forward_kwargs",
    "it calls the embedding for all rows if a request replaces some",
)
def reduce_embedding(partial: torch.Tensor) -> torch.Tensor:
    """Sum the rows that SGLang's embedding looked up (replaces the all-reduce in ``vocab_parallel_embedding``).

    Every rank has looked up its part of the vocabulary for all tokens: a token's row comes from one
    rank, and is zero on all others. In SP mode each rank needs the sum for its own tokens only. An
    all-to-all over the SP group and a local sum send half of what an all-reduce does; gloo's
    reduce-scatter is no way to it, as it is an all-reduce inside. The sum is exact in any order.

    Args:
        partial: ``[T, h]``: this rank's part of the sum.

    Returns:
        In an SP step ``[ceil(T / S), h]``, what :func:`sp_entry_scatter` would keep of the sum; otherwise ``[T, h]``.
    """
    # Where a request replaces the embeddings of some tokens, SGLang writes them into all T rows.
    if region.batch is None or get_forward().sp_active or region.batch.replace_embeds is not None:
        return tensor_model_parallel_all_reduce(partial)
    groups = region.groups
    region.enter(partial.shape[0], partial.device)
    region.embedded = True
    received = groups.exchange.all_to_all(kernels.pack_tokens(partial, groups.layout.sp_size))
    return groups.base_all_reduce(received.sum(0))


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[n, h]`` with zeros up to ``rows`` rows; ``x`` itself where it has them."""
    return x if x.shape[0] == rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))


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
    """Leave the region (replaces ``layernorm_sp.maybe_exit_gather``).

    Args:
        hidden_states: ``[T_local, h]`` in SP mode, else ``[T, h]``, returned as it is.
        hidden_states_before_norm: The same, before the final norm, where the caller wants it.
        input_ids: Unused: the entry recorded what there is to know.
        forward_mode: The batch's mode.

    Returns:
        ``[T, h]`` with the rows that the LM head (or a capture) reads; the others are zeros.
    """
    if not runs_sp(forward_mode):
        return hidden_states, hidden_states_before_norm
    hidden_states = exit_gather(hidden_states, region.exit)
    if hidden_states_before_norm is not None:
        hidden_states_before_norm = exit_gather(hidden_states_before_norm, region.exit)
    get_forward().set("sp_active", False)
    return hidden_states, hidden_states_before_norm


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


def plan_exit(rows: torch.Tensor | None, num_tokens: int, device: torch.device) -> Exit | None:
    """How ``rows`` leave the region.

    Args:
        rows: Sorted wanted rows of the step's T, the same on every rank, on the CPU; None for all.
        num_tokens: T, with the rows that pad it to a graph's size.
        device: Where the rows are.

    Returns:
        None where a rank sends all that it carries.
    """
    if rows is None:
        return None
    size, me = region.groups.layout.sp_size, region.groups.sp_index
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


def exit_gather(local: torch.Tensor, way: Exit | None) -> torch.Tensor:
    """All-gather the wanted rows over the SP group.

    Args:
        local: ``[T_local, h]``.
        way: Which rows, and how; None for all.

    Returns:
        ``[T, h]``: the wanted rows in their places, zeros elsewhere.
    """
    if way is None:
        return _gather_all(local)
    groups = region.groups
    sent = local.new_zeros((way.most, *local.shape[1:]))
    sent[: len(way.mine)] = local[way.mine]
    received = local.new_empty((groups.layout.sp_size * way.most, *local.shape[1:]))
    groups.sp_group.all_gather_into_tensor(received, sent)
    out = local.new_zeros((region.num_tokens, *local.shape[1:]))
    out[way.rows] = received[way.places]
    return out


def _gather_all(local: torch.Tensor) -> torch.Tensor:
    groups = region.groups
    full = local.new_empty((groups.layout.sp_size * local.shape[0], *local.shape[1:]))
    groups.sp_group.all_gather_into_tensor(full, local.contiguous())
    return full[: region.num_tokens]
