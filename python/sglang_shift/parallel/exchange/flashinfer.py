"""The exchange by FlashInfer's Ulysses communicator: an NVLink kernel, or NCCL with its own packing."""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch

from sglang_shift.parallel.exchange.base import Group, Matmul, SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import padded_local_tokens

WORLD_SIZES = (2, 4, 6, 8)
"""Sizes of a group for which FlashInfer has its NVLink kernel (``SUPPORTED_WORLD_SIZES``)."""


class FlashInferExchange(SequenceExchange):
    """One call of ``flashinfer.comm.ulysses.UlyssesCommunicator`` for Q, K and V together, one for O.

    Base weights stand interleaved by rank, so a row of their product already is S blocks of D columns:
    as many "heads" of size D as there are ranks. Steps above the capacity, and what is not an exchange
    around attention, go the collective way.

    Args:
        group: The SP group.
        max_tokens: Of the largest step that it must serve.
        width: ``S * D`` of the widest exchange.
        dtype: Of its operands.

    Raises:
        ImportError: FlashInfer cannot be imported; on this rank alone.
        ValueError, RuntimeError: FlashInfer's, the same on all ranks.
    """

    def __init__(self, group: Group, max_tokens: int, width: int, dtype: torch.dtype) -> None:
        from flashinfer.comm.ulysses import UlyssesCommunicator

        self.group = group
        self._collective = CollectiveExchange(group)
        self._most_rows = padded_local_tokens(max_tokens, group.world_size)
        # "auto" is its choice between NVLink and NCCL by the topology, the same on all ranks.
        self._communicator = UlyssesCommunicator(
            group.device_group, max_elems=self._most_rows * width, dtype=dtype, backend="auto"
        )

    @property
    def on_nvlink(self) -> bool:
        """Whether FlashInfer took its NVLink kernel; else it is NCCL."""
        return bool(self._communicator.backend == "nvlink")

    @property
    def text(self) -> str:
        """The backend and why FlashInfer took it."""
        return f"flashinfer, {self._communicator.backend} ({self._communicator.decision.reason})"

    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        if x.shape[0] > self._most_rows:
            return self._collective.scatter_heads(x, project, width)
        size = self.group.world_size
        heads = project(x).view(1, x.shape[0], size, width // size)
        return self._communicator.scatter_heads(heads).view(-1, width // size)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        size, width = self.group.world_size, x.shape[1]
        if x.shape[0] > self._most_rows * size:
            return self._collective.gather_heads(x, project)
        blocks = kernels.pack_tokens(x, size)
        tokens = self._communicator.gather_heads(blocks.view(1, -1, 1, width))
        return project(tokens.view(-1, size * width))

    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        return self._collective.all_to_all(blocks)

    def close(self) -> None:
        """Give the memory back that ranks map from one another. Collective."""
        self._communicator.close()
