"""Computes the layout of the ranks of a deployment: base-TP groups and SP groups."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankLayout:
    """The P ranks of a deployment as a grid: S ranks for sequence parallelism, by t = P/S ranks for tensor parallelism.

    Rank r has base-TP index ``r % t`` and SP index ``r // t``. A base-TP group is t contiguous ranks, so its
    all-reduces (the heavy traffic) stay inside a node. An SP group has one rank of each base-TP group. In full TP, rank
    r has head block r, as in stock SGLang.

    Args:
        world_size: P, SGLang's ``--tp-size``.
        sp_size: S, ``--sp-size``. It divides P.

    Raises:
        ValueError: S does not divide P, or one of them is not positive.
    """

    world_size: int
    sp_size: int

    def __post_init__(self) -> None:
        if self.sp_size < 1 or self.world_size < 1 or self.world_size % self.sp_size:
            raise ValueError(f"--sp-size {self.sp_size} must divide --tp-size {self.world_size}")

    @property
    def base_tp_size(self) -> int:
        """t = P/S, the tensor-parallel width of the base configuration."""
        return self.world_size // self.sp_size

    def sp_index(self, rank: int) -> int:
        """The number of the 1/S of a step's tokens that ``rank`` carries in SP mode."""
        return rank // self.base_tp_size

    def base_tp_index(self, rank: int) -> int:
        """The number of the 1/t of the base weights that ``rank`` holds."""
        return rank % self.base_tp_size

    def sp_groups(self) -> list[list[int]]:
        """The t groups of S ranks that exchange sequences. Each group is in the order of SP indices."""
        t = self.base_tp_size
        return [list(range(start, self.world_size, t)) for start in range(t)]

    def base_tp_groups(self) -> list[list[int]]:
        """The S groups of t contiguous ranks that all-reduce in SP mode."""
        t = self.base_tp_size
        return [list(range(start, start + t)) for start in range(0, self.world_size, t)]


def padded_local_tokens(num_tokens: int, sp_size: int) -> int:
    """The rows of each rank in an SP step: ``ceil(num_tokens / S)``. On the last ranks, some rows may be padding."""
    return -(-num_tokens // sp_size)
