"""The linear layers of a decoder layer in SP steps. They use the assembled base weights.

Attention runs between a :class:`QkvProjection` and an :class:`OutputProjection`. Its input is the same as in full TP:
all tokens, and this rank's heads. All other linears compute this rank's tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sglang_shift.errors import ShiftError
from sglang_shift.parallel.step import Step, current_step
from sglang_shift.seams import relies_on
from sglang_shift.weights.base_weights import Base
from sglang_shift.weights.stacked import Rows


class Projection:
    """One linear layer in SP steps.

    Args:
        linear: SGLang's linear. Its parameters are views of ``base``.
        base: The weight and bias of this rank in the base configuration.
    """

    def __init__(self, linear: Any, base: Base) -> None:
        self.linear = linear
        self.base = base

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Turn input rows ``x`` into the rows that the next operation of the layer needs."""
        raise NotImplementedError

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run as the linear's ``forward``. Return the rows, and the bias if the model adds the bias itself."""
        return self.forward(x, current_step()), self.linear.bias if self.linear.skip_bias_add else None


class ColumnProjection(Projection):
    """A column-parallel linear outside of attention. Takes this rank's tokens.

    It returns a shape that any operation on single elements can use unchanged, for example SGLang's activations.
    """

    def forward(self, x: Rows, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T_local * S, n]``; to ``[T_local, P * n]`` if SGLang's linear gathers its output.

        The product has ``S * n`` columns, one block for each SP rank. Each block becomes one row: for gate and up,
        ``[gate0 up0 | gate1 up1 | ...]`` becomes a row of each pair.
        """
        out = self.base.columns(x)
        if self.linear.gather_output:
            return self._gather_columns(out, step)
        return out.reshape(-1, self.base.outputs // step.topology.layout.sp_size)

    def _gather_columns(self, out: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local, S * n]`` to ``[T_local, S * t * n]``, in the order of TP ranks: rank ``s * t + j``."""
        topology = step.topology
        if topology.base_tp_group is None:
            return out
        size, width = topology.layout.sp_size, topology.layout.base_tp_size
        parts = topology.base_tp_group.all_gather(out, 0).view(width, out.shape[0], size, -1)
        return parts.permute(1, 2, 0, 3).reshape(out.shape[0], -1)


class QkvProjection(Projection):
    """A column-parallel linear before attention. Takes this rank's tokens, and returns what full TP's linear does."""

    @relies_on(
        "sglang.srt.layers.layernorm:RMSNorm.forward_with_per_tensor_quant_fusion",
        "On a GPU, this method quantizes the rows of a linear in fp8 with a static scale.",
    )
    def forward(self, x: Rows, step: Step) -> torch.Tensor:
        """``[T_local, h]`` to ``[T, q + k + v]``. The rows of the base weight are blocks, one for each SP rank."""
        step.in_attention, step.gathered = True, None
        exchange, width = step.topology.exchange, self.base.outputs
        if isinstance(x, tuple):
            quantized, scale, dtype = x
            rows = exchange.scatter_heads(quantized, lambda part: self.base.columns((part, scale, dtype)), width)
        else:
            rows = exchange.scatter_heads(x, self.base.columns, width)
        return rows[: step.num_tokens]


class RowProjection(Projection):
    """A row-parallel linear outside of attention. Takes the rows of a :class:`ColumnProjection`."""

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run as the linear's ``forward``.

        The rows are complete sums. If the caller asks for a partial sum (``skip_all_reduce``), its own sum later is an
        identity (:mod:`sglang_shift.layers.sums`).
        """
        if kwargs.get("output_tensor") is not None:
            raise ShiftError("SP steps cannot write the result of a row-parallel linear into a buffer of the caller")
        return super().__call__(x)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T_local * S, n]`` to ``[T_local, h]``, summed over the base-TP group.

        If SGLang's linear divides its input itself, that is ``[T_local, P * n]``.
        """
        topology = step.topology
        if not self.linear.input_is_parallel and topology.base_tp_group is not None:
            size, width = topology.layout.sp_size, topology.layout.base_tp_size
            x = x.view(x.shape[0], size, width, -1)[:, :, topology.layout.base_tp_index(topology.rank)]
        return topology.base_all_reduce(self.part_of_sum(x.reshape(-1, self.base.inputs), step))

    def part_of_sum(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Compute this rank's product. Only one rank of each base-TP group adds the bias, so a sum has it once."""
        return self.base.rows(x, with_bias=step.topology.adds_row_bias and not self.linear.skip_bias_add)


class OutputProjection(RowProjection):
    """A row-parallel linear after attention. Takes this rank's heads of all tokens, and returns this rank's tokens."""

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """``[T, d]`` to ``[T_local, h]``, summed over the base-TP group."""
        step.in_attention = False
        topology = step.topology
        return topology.base_all_reduce(topology.exchange.gather_heads(x, partial(self.part_of_sum, step=step)))


class HeadsProjection:
    """A column-parallel linear inside of attention. It takes all tokens, and computes this rank's heads as in TP.

    Args:
        linear: SGLang's linear with its TP shard.
    """

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        linear = self.linear
        bias = linear.bias if linear.skip_bias_add else None
        return linear.quant_method.apply(linear, x, None if linear.skip_bias_add else linear.bias), bias
