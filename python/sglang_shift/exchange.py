"""The Ulysses exchange: all-to-all between "my tokens, all heads" and "all tokens, my heads".

Ulysses sequence parallelism is arXiv 2309.14509; both directions move the same bytes:
``(S - 1) / S`` of what a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Group(Protocol):
    """What the exchange needs of SGLang's ``GroupCoordinator``."""

    world_size: int
    rank_in_group: int

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Block i of ``input`` goes to rank i; block j of ``output`` came from rank j."""


@dataclass
class SequenceExchange:
    """Exchange over one SP group, by SGLang's ``all_to_all_single`` with a pack or unpack copy.

    Attributes:
        group: The SP group of S ranks.
        bytes_sent: Bytes this rank has sent to other ranks so far.
        calls: Exchanges so far.
    """

    group: Group
    bytes_sent: int = field(default=0, init=False)
    calls: int = field(default=0, init=False)

    def scatter_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the tokens, scatter the heads.

        Args:
            x: ``[T_local, S * D]``: this rank's tokens; column block i is for SP rank i.

        Returns:
            ``[S * T_local, D]``: the tokens of all ranks in SP order, this rank's columns.
        """
        size = self.group.world_size
        tokens, width = x.shape[0], x.shape[1] // size
        packed = x.view(tokens, size, width).transpose(0, 1).contiguous()
        return self._all_to_all(packed).view(size * tokens, width)

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Scatter the tokens, gather the heads: the inverse of :meth:`scatter_heads`.

        Args:
            x: ``[S * T_local, D]``: all tokens, this rank's columns; contiguous.

        Returns:
            ``[T_local, S * D]``: this rank's tokens; column block i came from SP rank i.
        """
        size = self.group.world_size
        tokens, width = x.shape[0] // size, x.shape[1]
        received = self._all_to_all(x.view(size, tokens, width))
        return received.transpose(0, 1).reshape(tokens, size * width)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Exchanges inside do not count: they serve no request."""
        counts = self.bytes_sent, self.calls
        try:
            yield
        finally:
            self.bytes_sent, self.calls = counts

    def _all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(blocks)
        # Flat: PyNccl splits by element count, gloo by the first dimension; both agree on 1-D.
        self.group.all_to_all_single(received.view(-1), blocks.view(-1))
        size = self.group.world_size
        self.bytes_sent += blocks.numel() * blocks.element_size() * (size - 1) // size
        self.calls += 1
        return received
