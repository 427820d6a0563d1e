"""Which rank does what: base-TP groups and SP groups of one deployment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankLayout:
    """The P ranks of a deployment as a grid of S sequence-parallel by t = P/S tensor-parallel.

    With t = P/S, rank r has base-TP index ``r % t`` and SP index ``r // t``. A base-TP group is t
    contiguous ranks, so its all-reduces (the heavy traffic) stay inside a node; an SP group strides
    over them. Under full TP rank r keeps head block r, as in stock SGLang.

    Args:
        world_size: P, SGLang's ``--tp-size``.
        sp_size: S, ``--sp-size``; divides P.

    Raises:
        ValueError: S does not divide P, or either is not positive.
    """

    world_size: int
    sp_size: int

    def __post_init__(self) -> None:
        if self.sp_size < 1 or self.world_size < 1 or self.world_size % self.sp_size:
            raise ValueError(f"--sp-size {self.sp_size} must divide --tp-size {self.world_size}")

    @property
    def base_tp_size(self) -> int:
        """T = P/S, the tensor-parallel width of the base configuration."""
        return self.world_size // self.sp_size

    def sp_index(self, rank: int) -> int:
        """Which 1/S of a step's tokens ``rank`` carries in SP mode."""
        return rank // self.base_tp_size

    def base_tp_index(self, rank: int) -> int:
        """Which 1/t of the base weights ``rank`` holds."""
        return rank % self.base_tp_size

    def sp_groups(self) -> list[list[int]]:
        """The t groups of S ranks that exchange sequences, each in SP-index order."""
        t = self.base_tp_size
        return [list(range(start, self.world_size, t)) for start in range(t)]

    def base_tp_groups(self) -> list[list[int]]:
        """The S groups of t contiguous ranks that all-reduce in SP mode."""
        t = self.base_tp_size
        return [list(range(start, start + t)) for start in range(0, self.world_size, t)]


def padded_local_tokens(num_tokens: int, sp_size: int) -> int:
    """Rows each rank carries of a step in SP: ``ceil(num_tokens / S)``; the last ranks' may be padding."""
    return -(-num_tokens // sp_size)
