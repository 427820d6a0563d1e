"""Builds a topology: the groups of ranks that communicate in SP steps. They exist beside SGLang's own TP group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GraphCaptureContext, GroupCoordinator, init_model_parallel_group
from sglang.srt.runtime_context import get_device, get_parallel

from sglang_shift.parallel.exchange.base import SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.seams import relies_on


@dataclass(frozen=True)
class Topology:
    """This rank's place in the base configuration, and the groups that it communicates over.

    A topology is a value. Each step gets one, and the next step may get another one.

    Attributes:
        layout: The grid of S by t ranks.
        rank: This rank, 0 to P - 1.
        sp_group: S ranks that divide the tokens of a step.
        base_tp_group: t contiguous ranks that divide the base weights; None if t = 1.
        exchange: The all-to-all over ``sp_group``.
    """

    layout: RankLayout
    rank: int
    sp_group: GroupCoordinator
    base_tp_group: GroupCoordinator | None
    exchange: SequenceExchange

    @property
    def sp_index(self) -> int:
        """The number of the 1/S of a step's tokens that this rank carries in SP mode."""
        return self.layout.sp_index(self.rank)

    @property
    def adds_row_bias(self) -> bool:
        """Whether this rank adds a row-parallel bias. One rank of each base-TP group adds it."""
        return self.layout.base_tp_index(self.rank) == 0

    def base_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the base-TP group. If the group is this rank alone, return ``x`` itself."""
        return x if self.base_tp_group is None else self.base_tp_group.all_reduce(x)

    @relies_on(
        "sglang.srt.distributed.parallel_state:graph_capture",
        "This function lets SGLang's own groups communicate in a graph, with the custom all-reduce.",
    )
    @contextmanager
    def graph_capture(self, stream: Any) -> Iterator[None]:
        """Inside of this context, a CUDA graph on ``stream`` can capture the communication of our groups.

        SGLang does the same for its own groups.
        """
        own = [] if self.base_tp_group is None else [self.sp_group, self.base_tp_group]
        with ExitStack() as stack:
            for group in own:
                stack.enter_context(group.graph_capture(GraphCaptureContext(stream)))
            yield

    def warm_up(self, tokens: int, hidden: int, width: int, dtype: torch.dtype, device: str) -> None:
        """Run each collective of an SP step once with its largest size: as eager steps do, and as CUDA graphs do.

        At the first call of a collective, NCCL makes channels and allocates memory for them. CUDA graphs use PyNccl,
        which has its own communicator. Once the model is loaded, SGLang gives all free memory to the KV pool, so NCCL
        must have its memory before. This is a collective: all ranks call it.

        Args:
            tokens: The tokens of the largest step.
            hidden: The columns of the rows that leave the region.
            width: ``S * D``, the most columns of an exchange.
            dtype: The type of activations.
            device: The device of activations.
        """
        size = self.layout.sp_size
        rows = padded_local_tokens(tokens, size)
        local = torch.zeros(rows, hidden, dtype=dtype, device=device)
        blocks = torch.zeros(rows * max(width, size * hidden), dtype=dtype, device=device)
        for transport in transports(self.sp_group):
            with transport:
                self.sp_group.all_to_all_single(torch.empty_like(blocks), blocks)
                self.sp_group.all_gather_into_tensor(local.new_empty(size * rows, hidden), local)
        if self.base_tp_group is not None:
            for transport in transports(self.base_tp_group):
                with transport:
                    self.base_tp_group.all_reduce(local)


def transports(group: Any) -> Iterator[AbstractContextManager[None]]:
    """Contexts for collectives of SGLang's ``group``: the first as in eager steps, the second as in CUDA graphs.

    If the group has no PyNccl, there is only the first context.
    """
    yield nullcontext()
    if (pynccl := group.pynccl_comm) is not None and pynccl.available:
        yield pynccl.change_state(enable=True)


def build_topology(layout: RankLayout) -> Topology:
    """Build the groups, with the collective exchange. All ranks call it, after SGLang has built its groups."""
    tp_group = get_parallel().tp_group
    rank = tp_group.rank_in_group
    if layout.base_tp_size == 1:
        sp_group, base_tp_group = tp_group, None  # S = P: the SP group is SGLang's TP group
    else:
        sp_group = new_group(layout.sp_groups(), tp_group, "shift_sp", fast_all_reduce=False)
        base_tp_group = new_group(layout.base_tp_groups(), tp_group, "shift_base_tp", fast_all_reduce=None)
    return Topology(layout, rank, sp_group, base_tp_group, CollectiveExchange(sp_group))


def whole_world(topology: Topology) -> Topology:
    """A topology in which all P ranks are one SP group: SGLang's TP group. It is ``topology`` itself if S = P."""
    size, group = topology.layout.world_size, get_parallel().tp_group
    if topology.layout.base_tp_size == 1:
        return topology
    return Topology(RankLayout(size, size), topology.rank, group, None, CollectiveExchange(group))


def new_group(
    groups: list[list[int]], tp_group: GroupCoordinator, name: str, *, fast_all_reduce: bool | None
) -> GroupCoordinator:
    """Build this rank's group of ``groups``, with the backend of SGLang's TP group.

    ``fast_all_reduce`` says whether to build communicators that only serve all-reduces. If it is None, SGLang's flags
    decide.
    """
    return init_model_parallel_group(
        [[tp_group.ranks[i] for i in members] for members in groups],
        get_device().gpu_id,
        torch.distributed.get_backend(tp_group.device_group),
        use_custom_allreduce=fast_all_reduce,
        use_mscclpp=fast_all_reduce,
        use_torch_symm_mem_allreduce=fast_all_reduce,
        group_name=name,
    )
