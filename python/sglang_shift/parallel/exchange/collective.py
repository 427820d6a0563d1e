"""The exchange by the group's own all-to-all, between a pack and an unpack kernel."""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch

from sglang_shift.parallel.exchange.base import Group, Matmul, SequenceExchange


class CollectiveExchange(SequenceExchange):
    """One ``all_to_all_single`` for Q, K and V together, one for O.

    Args:
        group: The SP group.
        fp8: Whether Q, K, V and O travel as fp8.
    """

    def __init__(self, group: Group, fp8: bool = False) -> None:
        self.group = group
        self.fp8 = fp8

    @property
    def text(self) -> str:
        return "collective, fp8" if self.fp8 else "collective"

    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        blocks = kernels.pack_heads(project(x), self.group.world_size, fp8=self.fp8)
        return kernels.unpack_tokens(self.all_to_all(blocks), x.dtype)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        blocks = kernels.pack_tokens(x, self.group.world_size, fp8=self.fp8)
        return project(kernels.unpack_heads(self.all_to_all(blocks), x.dtype))

    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(blocks)
        # Flat: PyNccl splits by element count, gloo by the first dimension; both agree on 1-D.
        self.group.all_to_all_single(received.view(-1), blocks.view(-1))
        return received
