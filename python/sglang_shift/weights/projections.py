"""The four projections of a decoder layer in SP mode, on the assembled base weights.

They take the place of SGLang's two LayerNorm-SP matmuls. Attention sits between ``qkv`` and ``o``
and sees what full TP would have given it: all tokens, this rank's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_shift.parallel.step import Step


@dataclass
class BaseWeight:
    """An assembled base weight, shaped like the layer that SGLang's ``quant_method.apply`` reads."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class Projection:
    """One linear layer in SP mode.

    Attributes:
        linear: SGLang's linear; its parameters are views of ``base``.
        base: The weights of this rank in the base configuration.
    """

    linear: Any
    base: BaseWeight

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """From the rows this projection is given to those its consumer takes."""
        raise NotImplementedError

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ base.T + bias`` by the layer's own method."""
        return self.linear.quant_method.apply(self.base, x, self.base.bias)


class RowProjection(Projection):
    """A row-parallel linear, whose products are summed over the base-TP group."""

    def part_of_sum(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """This rank's product. The bias counts once per sum: one rank of each base-TP group adds it."""
        bias = self.base.bias if step.topology.adds_row_bias else None
        return self.linear.quant_method.apply(self.base, x, bias)


class QkvProjection(Projection):
    """Local tokens in, all tokens and this rank's heads out: what full TP's projection gives."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T, q + k + v]``; base rows are interleaved by SP rank."""
        width = self.base.weight.shape[0]
        rows = step.topology.exchange.scatter_heads(x, self.matmul, width)
        return rows[: step.num_tokens]


class OutputProjection(RowProjection):
    """All tokens and this rank's heads in, local tokens out."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T, d]`` to ``[T_local, h]``, summed over the base-TP group."""
        topology = step.topology
        return topology.base_all_reduce(topology.exchange.gather_heads(x, partial(self.part_of_sum, step=step)))


class GateUpProjection(Projection):
    """Local tokens in; out, a shape on which SGLang's activation works as it is."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T_local * S, 2n]``: the base's ``S * 2n`` columns, one shard a row.

        The shards stand as ``[gate0 up0 | gate1 up1 | ...]``, so each row is one (gate, up) pair.
        """
        shard_width = self.base.weight.shape[0] // step.topology.layout.sp_size
        return self.matmul(x).view(-1, shard_width)


class DownProjection(RowProjection):
    """The activation's rows in, local tokens out."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local * S, n]`` to ``[T_local, h]``, summed over the base-TP group."""
        return step.topology.base_all_reduce(self.part_of_sum(x.reshape(-1, self.base.weight.shape[1]), step))
