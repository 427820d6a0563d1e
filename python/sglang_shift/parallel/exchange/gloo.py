"""Exchanges on CPUs, over gloo, by single messages, which overlap with the matmul before or after the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sglang_shift_kernels as kernels
import torch
import torch.distributed as dist

from sglang_shift.parallel.exchange.base import Matmul
from sglang_shift.parallel.exchange.collective import CollectiveExchange

PART_BYTES = 256 << 10
"""The least bytes to other ranks in one part. A smaller part takes more time to handle than it hides."""
MAX_PARTS = 4
"""The most parts. Each part has its own matmul, and a matmul of few rows is slow."""
MESSAGE_BYTES = 16 << 10
"""The least bytes of a block for an all-to-all of single messages. Smaller blocks use gloo's all-to-all."""


def number_of_parts(size: int, ranks: int) -> int:
    """The number of parts for blocks of ``size`` bytes in total, from ``ranks`` ranks. It is equal on every rank."""
    to_others = size * (ranks - 1) // ranks
    return max(1, min(MAX_PARTS, to_others // PART_BYTES))


@dataclass
class Pending:
    """Blocks that are on their way. ``received`` holds them once all of ``works`` are done."""

    received: torch.Tensor
    works: Sequence[dist.Work] = ()

    def wait(self) -> torch.Tensor:
        """Wait for the blocks, and return them."""
        for work in self.works:
            work.wait()
        return self.received


class GlooExchange(CollectiveExchange):
    """Divides a large exchange into parts, so that messages of one part overlap with the matmul of another part."""

    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        size = self.group.world_size
        row_bytes = self.row_bytes(width // size, x.element_size())
        pending, dtype = [], x.dtype
        for part in x.tensor_split(self._parts(x.shape[0] * size * row_bytes)):
            heads = project(part)
            pending.append(self._start(kernels.pack_heads(heads, size, fp8=self.fp8)))
            dtype = heads.dtype
        return kernels.unpack_tokens(_concatenate([p.wait() for p in pending], dim=1), dtype)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        blocks = kernels.pack_tokens(x, self.group.world_size, fp8=self.fp8)
        pending = [self._start(part.contiguous()) for part in blocks.tensor_split(self._parts(blocks.nbytes), dim=1)]
        return _concatenate([project(kernels.unpack_heads(p.wait(), x.dtype)) for p in pending])

    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._start(blocks).wait()

    def _parts(self, size: int) -> int:
        return number_of_parts(size, self.group.world_size)

    def _start(self, blocks: torch.Tensor) -> Pending:
        if blocks.nbytes < MESSAGE_BYTES * len(blocks):
            return Pending(super().all_to_all(blocks))
        received = torch.empty_like(blocks)
        return Pending(received, self._send_and_receive(blocks, received))

    def _send_and_receive(self, blocks: torch.Tensor, received: torch.Tensor) -> list[dist.Work]:
        """Start an all-to-all of single messages.

        Gloo's own all-to-all sends first and receives afterwards, so large blocks take twice as long.
        """
        me, group = self.group.rank_in_group, self.group.device_group
        others = [rank for rank in range(self.group.world_size) if rank != me]
        works = [dist.irecv(received[rank], group=group, group_src=rank) for rank in others]
        works += [dist.isend(blocks[rank], group=group, group_dst=rank) for rank in others]
        received[me] = blocks[me]
        return works


def _concatenate(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate the parts on ``dim``. A single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
