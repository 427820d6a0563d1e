"""The collective exchange uses the group's own all-to-all, with a kernel before it and a kernel after it."""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch

from sglang_shift.parallel.exchange.base import Group, Matmul, SequenceExchange


class CollectiveExchange(SequenceExchange):
    """Runs one ``all_to_all_single`` for Q, K and V together, and one for O.

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
        heads = project(x)
        blocks, dtype = kernels.pack_heads(heads, self.group.world_size, fp8=self.fp8), heads.dtype
        del heads  # their memory is free while the blocks travel
        return kernels.unpack_tokens(self.all_to_all(blocks), dtype)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        blocks = kernels.pack_tokens(x, self.group.world_size, fp8=self.fp8)
        return project(kernels.unpack_heads(self.all_to_all(blocks), x.dtype))

    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(blocks)
        # PyNccl splits by element count, and gloo by the first dimension. For flat tensors both are the same.
        self.group.all_to_all_single(received.view(-1), blocks.view(-1))
        return received
