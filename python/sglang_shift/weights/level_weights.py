"""The weights of a model at a level: views of the base weights, so that all levels share one copy.

A base weight is the shards of the S ranks of an SP group, side by side: ``[q0 k0 v0 | q1 k1 v1 | ...]``. One of these
shards is a *block*. A rank of a level of k ranks has ``P / k`` blocks, and they follow each other. So its weight at any
level is a slice of the base weight. If t = P/S is not 1, these blocks are t apart in the model. But each block of the
model is on one rank of the instance, and that is all that counts.

If a rank has several blocks, the columns of its product are ordered by blocks, and SGLang expects all q first, then all
k, then all v. :class:`BlockOrder` and :class:`BlockRows` take care of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.base_weights import Base, BaseWeight, BaseWeights


@dataclass(frozen=True)
class Blocks:
    """The blocks of a rank at a level.

    Attributes:
        total: S, the number of blocks of a base weight.
        first: The first block of this rank.
        count: How many blocks this rank has.
    """

    total: int
    first: int
    count: int

    @classmethod
    def of(cls, total: int, ranks: int, place: int) -> Blocks:
        """The blocks of rank ``place`` of those ranks of an instance that divide a base weight of ``total`` blocks."""
        count = total // ranks
        return cls(total, place * count, count)

    def of_tensor(self, base: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's blocks of a base tensor: a view."""
        block = base.shape[dim] // self.total
        return base.narrow(dim, self.first * block, self.count * block)


class BlockOrder:
    """A forward hook: it orders the columns of a product by parts, as SGLang's attention expects them.

    It copies the product. That is what the exchange of an SP step does as well, so a copy costs less than SP.

    Args:
        parts: The columns of each part in one block: of q, k and v.
        count: The blocks of this rank.
    """

    def __init__(self, parts: list[int], count: int) -> None:
        self.parts, self.count = parts, count

    def __call__(self, module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        """``[n, [q0 k0 v0 | q1 k1 v1 | ...]]`` to ``[n, [q0 q1 ... | k0 k1 ... | v0 v1 ...]]``."""
        rows, bias = output
        blocks = rows.reshape(rows.shape[0], self.count, sum(self.parts))
        return torch.cat([part.flatten(1) for part in blocks.split(self.parts, -1)], -1), bias


class BlockRows:
    """A forward hook: it makes each block of a product a row of its own. Nothing is copied.

    Operations on single elements, such as SGLang's activations, then see one block at a time, as in full TP.

    Args:
        columns: The columns of a block.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        """``[n, [g0 u0 | g1 u1 | ...]]`` to ``[n * blocks, [g u]]``."""
        rows, bias = output
        return rows.reshape(-1, self.columns), bias


class JoinBlocks:
    """A hook before the forward of a row-parallel linear: it undoes :class:`BlockRows`.

    Args:
        columns: The columns of this rank's weight.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``[n * blocks, width of a block]`` to ``[n, columns]``."""
        return args[0].reshape(-1, self.columns), *args[1:]


class LevelWeights(BaseWeights):
    """The base weights of SP steps at a level: those of the whole world, which have the parts of all ranks already.

    Args:
        model: The model of the level.
        topology: How SP steps of the level divide tokens.
        whole: The weights and biases of the whole world, by the names of their linears.
    """

    def __init__(
        self, model: torch.nn.Module, topology: Topology, whole: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    ) -> None:
        super().__init__(model, topology)
        self.whole = whole

    def assemble(self, linear: Any, name: str = "") -> Base:
        """The base weight of this name. It is no collective, because nothing is gathered."""
        base = self.bases[linear] = BaseWeight(linear, self.topology, *self.whole[name])
        return base

    def release_unused(self) -> None:
        """There is nothing to release: the parameters are views of what the whole world has."""
