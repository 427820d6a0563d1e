"""A topology: who shares what with whom in SP steps, over which groups. Built beside SGLang's own TP group."""

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
    """This rank's place in the base configuration, and the groups it communicates over.

    It is a value: each step is given one, and the next step may be given another.

    Attributes:
        layout: The grid of S by t ranks.
        rank: This rank, 0 to P - 1.
        sp_group: S ranks that share a step's tokens.
        base_tp_group: t contiguous ranks that share the base weights; None where t = 1.
        exchange: The all-to-all over ``sp_group``.
    """

    layout: RankLayout
    rank: int
    sp_group: GroupCoordinator
    base_tp_group: GroupCoordinator | None
    exchange: SequenceExchange

    @property
    def sp_index(self) -> int:
        """Which 1/S of the tokens this rank carries in SP mode."""
        return self.layout.sp_index(self.rank)

    @property
    def adds_row_bias(self) -> bool:
        """Whether this rank adds a row-parallel bias: one rank of each base-TP group does."""
        return self.layout.base_tp_index(self.rank) == 0

    def base_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the base-TP group; ``x`` itself where that group is this rank alone."""
        return x if self.base_tp_group is None else self.base_tp_group.all_reduce(x)

    @relies_on(
        "sglang.srt.distributed.parallel_state:graph_capture",
        "it lets SGLang's own groups communicate in a graph, with the custom all-reduce",
    )
    @contextmanager
    def graph_capture(self, stream: Any) -> Iterator[None]:
        """Inside, the groups communicate as a CUDA graph on ``stream`` can capture it; SGLang sees to its own."""
        own = [] if self.base_tp_group is None else [self.sp_group, self.base_tp_group]
        with ExitStack() as stack:
            for group in own:
                stack.enter_context(group.graph_capture(GraphCaptureContext(stream)))
            yield

    def warm_up(self, tokens: int, hidden: int, width: int, dtype: torch.dtype, device: str) -> None:
        """Make each collective of an SP step once at its largest: eagerly, and as CUDA graphs do. Collective.

        NCCL makes the channels of a collective, and takes memory for them, when it is first called; PyNccl,
        which serves graphs, has a communicator of its own. SGLang gives what is free to the KV pool after the
        model is loaded.

        Args:
            tokens: Of the largest step.
            hidden: Columns of what leaves the region.
            width: ``S * D``, the most columns of an exchange.
            dtype: Of activations.
            device: Where they are.
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
    """Inside of each, collectives of SGLang's ``group`` go one of their ways: as in eager steps; as in graphs."""
    yield nullcontext()
    if (pynccl := group.pynccl_comm) is not None and pynccl.available:
        yield pynccl.change_state(enable=True)


def build_topology(layout: RankLayout) -> Topology:
    """Build the groups, with the exchange that needs nothing else. Collective, after SGLang's groups exist."""
    tp_group = get_parallel().tp_group
    rank = tp_group.rank_in_group
    if layout.base_tp_size == 1:
        sp_group, base_tp_group = tp_group, None  # S = P: the SP group is SGLang's TP group
    else:
        sp_group = _new_group(layout.sp_groups(), tp_group, "shift_sp", fast_all_reduce=False)
        base_tp_group = _new_group(layout.base_tp_groups(), tp_group, "shift_base_tp", fast_all_reduce=None)
    return Topology(layout, rank, sp_group, base_tp_group, CollectiveExchange(sp_group))


def _new_group(
    groups: list[list[int]], tp_group: GroupCoordinator, name: str, *, fast_all_reduce: bool | None
) -> GroupCoordinator:
    """``fast_all_reduce``: whether to build what serves all-reduces only; None as SGLang's flags say."""
    return init_model_parallel_group(
        [[tp_group.ranks[i] for i in members] for members in groups],
        get_device().gpu_id,
        torch.distributed.get_backend(tp_group.device_group),
        use_custom_allreduce=fast_all_reduce,
        use_mscclpp=fast_all_reduce,
        use_torch_symm_mem_allreduce=fast_all_reduce,
        group_name=name,
    )
