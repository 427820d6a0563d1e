"""The base weight of a quantized linear: the shards of an SP group, stacked as SGLang's method has left them."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear

from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.stacked import Rows, StackedShards, stack_shards


class StackedBase:
    """A :class:`sglang_shift.weights.base_weights.Base` of stacked shards. To build it is a collective.

    Args:
        linear: SGLang's linear, after ``process_weights_after_loading``.
        topology: The groups that share the weights.
        name: The name of the linear in its model, for errors.

    Raises:
        Refused: the tensors are not all that a kernel reads, or the layer differs between ranks.
    """

    def __init__(self, linear: Any, topology: Topology, name: str) -> None:
        self.linear = linear
        self.shards = stack_shards(linear, topology, name)
        self.size = topology.layout.sp_size

    @property
    def outputs(self) -> int:
        if isinstance(self.linear, ColumnParallelLinear):
            return self.size * int(self.linear.output_size_per_partition)
        return int(self.linear.output_size)

    @property
    def inputs(self) -> int:
        if isinstance(self.linear, ColumnParallelLinear):
            return int(self.linear.input_size)
        return self.size * int(self.linear.input_size_per_partition)

    @property
    def text(self) -> str:
        return self.shards.text

    def columns(self, x: Rows) -> torch.Tensor:
        return self.shards.columns(x, add_bias=not self.linear.skip_bias_add)

    def rows(self, x: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        return self.shards.rows(x, add_bias=with_bias)

    def refresh(self) -> None:
        self.shards.refresh()

    def tensors(self) -> list[torch.Tensor]:
        return tensors_of(self.shards)


def tensors_of(shards: StackedShards) -> list[torch.Tensor]:
    """The tensors of one shard. They lie in the memory of all shards."""
    return [value for value in vars(shards.shards[0]).values() if isinstance(value, torch.Tensor)]
