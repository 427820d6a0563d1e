"""Exchanges with FlashInfer's Ulysses communicator, which uses an NVLink kernel, or NCCL with its own packing."""

from __future__ import annotations

import sglang_shift_kernels as kernels
import torch

from sglang_shift.parallel.exchange.base import Group, Matmul, SequenceExchange
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import padded_local_tokens

WORLD_SIZES = (2, 4, 6, 8)
"""The group sizes that FlashInfer's NVLink kernel supports (``SUPPORTED_WORLD_SIZES``)."""


class FlashInferExchange(SequenceExchange):
    """Calls ``flashinfer.comm.ulysses.UlyssesCommunicator`` once for Q, K and V together, and once for O.

    Base weights are ordered by rank, so a row of their product has S blocks of D columns. FlashInfer takes these for S
    heads of size D. Steps above the capacity use the collective exchange. So does :meth:`all_to_all`, which is not an
    exchange around attention.

    Args:
        group: The SP group.
        max_tokens: The tokens of the largest step that FlashInfer must serve.
        width: ``S * D`` of the widest exchange.
        dtype: The type of its operands.

    Raises:
        ImportError: this rank cannot import FlashInfer. Other ranks may not raise it.
        ValueError, RuntimeError: FlashInfer raises it on all ranks.
    """

    def __init__(self, group: Group, max_tokens: int, width: int, dtype: torch.dtype) -> None:
        from flashinfer.comm.ulysses import UlyssesCommunicator

        self.group = group
        self._collective = CollectiveExchange(group)
        self._most_rows = padded_local_tokens(max_tokens, group.world_size)
        # With "auto", FlashInfer chooses NVLink or NCCL by the links between the GPUs. All ranks get the same choice.
        self._communicator = UlyssesCommunicator(
            group.device_group, max_elems=self._most_rows * width, dtype=dtype, backend="auto"
        )

    @property
    def on_nvlink(self) -> bool:
        """Whether FlashInfer chose its NVLink kernel. Otherwise it chose NCCL."""
        return bool(self._communicator.backend == "nvlink")

    @property
    def text(self) -> str:
        """The backend, and why FlashInfer chose it."""
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
        """Free the memory that ranks map from one another. Collective."""
        self._communicator.close()
