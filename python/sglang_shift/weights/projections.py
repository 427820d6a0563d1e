"""The four projections of a decoder layer in SP mode, on the assembled base weights.

They take the place of SGLang's two LayerNorm-SP matmuls. Attention sits between ``qkv`` and ``o``
and sees what full TP would have given it: all tokens, this rank's heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_shift.parallel.region import region
from sglang_shift.parallel.topology import SequenceParallel
from sglang_shift.seams import relies_on, replaces


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
        parallel: The groups.
    """

    linear: Any
    base: BaseWeight
    parallel: SequenceParallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From the rows this projection is given to those its consumer takes."""
        raise NotImplementedError

    @property
    def bias(self) -> torch.Tensor | None:
        """What this rank adds."""
        return self.base.bias

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ base.T + bias`` by the layer's own method."""
        return self.linear.quant_method.apply(self.base, x, self.bias)


class RowProjection(Projection):
    """A row-parallel linear, whose products are summed over the base-TP group."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias counts once per sum: one rank of each base-TP group adds it."""
        return self.base.bias if self.parallel.adds_row_bias else None


class QkvProjection(Projection):
    """Local tokens in, all tokens and this rank's heads out: what full TP's projection gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T_local, h]`` to ``[T, q + k + v]``; base rows are interleaved by SP rank."""
        width = self.base.weight.shape[0]
        rows = self.parallel.exchange.scatter_heads(x, self.matmul, width)
        return rows[: region.num_tokens]


class OutputProjection(RowProjection):
    """All tokens and this rank's heads in, local tokens out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, d]`` to ``[T_local, h]``, summed over the base-TP group."""
        return self.parallel.base_all_reduce(self.parallel.exchange.gather_heads(x, self.matmul))


class GateUpProjection(Projection):
    """Local tokens in; out, a shape on which SGLang's activation works as it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T_local, h]`` to ``[T_local * S, 2n]``: the base's ``S * 2n`` columns, one shard a row.

        The shards stand as ``[gate0 up0 | gate1 up1 | ...]``, so each row is one (gate, up) pair.
        """
        shard_width = self.base.weight.shape[0] // self.parallel.layout.sp_size
        return self.matmul(x).view(-1, shard_width)


class DownProjection(RowProjection):
    """The activation's rows in, local tokens out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[T_local * S, n]`` to ``[T_local, h]``, summed over the base-TP group."""
        return self.parallel.base_all_reduce(self.matmul(x.reshape(-1, self.base.weight.shape[1])))


@replaces(
    "sglang.srt.layers.layernorm_sp:column_parallel_g_matmul", "QKV with its exchange, gate_up without communication"
)
@relies_on("sglang.srt.layers.linear:ColumnParallelLinear.forward", "it calls column_parallel_g_matmul while sp_active")
def column_parallel_g_matmul(linear: Any, input_parallel: torch.Tensor, bias: Any) -> torch.Tensor:
    """QKV or gate_up in SP mode (replaces ``layernorm_sp.column_parallel_g_matmul``).

    ``bias`` is this rank's TP shard and is not used: the base weight has its own.
    """
    return linear.ulysses.forward(input_parallel)


@replaces(
    "sglang.srt.layers.layernorm_sp:row_parallel_gbar_matmul",
    "O with its exchange, down; summed over the base-TP group only",
)
@relies_on("sglang.srt.layers.linear:RowParallelLinear.forward", "it calls row_parallel_gbar_matmul while sp_active")
def row_parallel_gbar_matmul(linear: Any, input_: torch.Tensor, bias: Any) -> torch.Tensor:
    """O or down in SP mode (replaces ``layernorm_sp.row_parallel_gbar_matmul``).

    ``bias`` follows full TP's rule (rank 0 adds it) and is not used: see :class:`RowProjection`.
    """
    return linear.ulysses.forward(input_)
