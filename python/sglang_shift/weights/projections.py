"""The four projections of a decoder layer in SP mode. They use the assembled base weights.

They replace SGLang's two LayerNorm-SP matmuls. Attention runs between ``qkv`` and ``o``. Its input is the same as in
full TP: all tokens, and this rank's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_shift.parallel.step import Step


@dataclass
class BaseWeight:
    """An assembled base weight with its bias. SGLang's ``quant_method.apply`` reads it like a layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class Projection:
    """One linear layer in SP mode.

    Attributes:
        linear: SGLang's linear. Its parameters are views of ``base``.
        base: The weight and bias of this rank in the base configuration.
    """

    linear: Any
    base: BaseWeight

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Turn input rows ``x`` into the rows that the next operation of the layer needs."""
        raise NotImplementedError

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Compute ``x @ base.T + bias``, with the layer's own method."""
        return self.linear.quant_method.apply(self.base, x, self.base.bias)


class RowProjection(Projection):
    """A row-parallel linear. The base-TP group sums its products."""

    def part_of_sum(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Compute this rank's product. Only one rank of each base-TP group adds the bias, so a sum has it once."""
        bias = self.base.bias if step.topology.adds_row_bias else None
        return self.linear.quant_method.apply(self.base, x, bias)


class QkvProjection(Projection):
    """Takes this rank's tokens, and returns this rank's heads of all tokens, as full TP's projection does."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T, q + k + v]``. The rows of the base weight are blocks, one for each SP rank."""
        width = self.base.weight.shape[0]
        rows = step.topology.exchange.scatter_heads(x, self.matmul, width)
        return rows[: step.num_tokens]


class OutputProjection(RowProjection):
    """Takes this rank's heads of all tokens, and returns this rank's tokens."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T, d]`` to ``[T_local, h]``, summed over the base-TP group."""
        topology = step.topology
        return topology.base_all_reduce(topology.exchange.gather_heads(x, partial(self.part_of_sum, step=step)))


class GateUpProjection(Projection):
    """Takes this rank's tokens, and returns a shape that SGLang's activation can use unchanged."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T_local * S, 2n]``.

        The product has ``S * 2n`` columns, ``[gate0 up0 | gate1 up1 | ...]``. Each (gate, up) pair becomes one row.
        """
        shard_width = self.base.weight.shape[0] // step.topology.layout.sp_size
        return self.matmul(x).view(-1, shard_width)


class DownProjection(RowProjection):
    """Takes the rows of the activation, and returns this rank's tokens."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local * S, n]`` to ``[T_local, h]``, summed over the base-TP group."""
        return step.topology.base_all_reduce(self.part_of_sum(x.reshape(-1, self.base.weight.shape[1]), step))
