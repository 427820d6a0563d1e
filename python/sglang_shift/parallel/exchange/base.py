"""Defines the Ulysses exchange: an all-to-all between "my tokens, all heads" and "all tokens, my heads".

Ulysses sequence parallelism is arXiv 2309.14509. In both directions, a rank sends ``(S - 1) / S`` of its bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sglang_shift_kernels.layout import SCALE_BYTES

from sglang_shift.parallel.layout import padded_local_tokens

Matmul = Callable[[torch.Tensor], torch.Tensor]


class Group(Protocol):
    """The part of SGLang's ``GroupCoordinator`` that an exchange needs."""

    world_size: int
    rank_in_group: int
    device_group: Any

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Send block i of ``input`` to rank i. Block j of ``output`` comes from rank j."""


class SequenceExchange(ABC):
    """The exchange over one SP group of S ranks.

    The exchange gets the matmul before or after it as an argument, so an implementation can overlap the two.

    Attributes:
        group: The SP group.
        fp8: Whether Q, K, V and O travel as fp8 (:mod:`sglang_shift_kernels.fp8`).
    """

    group: Group
    fp8: bool = False

    @property
    @abstractmethod
    def text(self) -> str:
        """The name of the implementation, in a few words, for the log and ``/server_info``."""

    @abstractmethod
    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        """Project, then gather the tokens and scatter the heads.

        Args:
            x: ``[T_local, h]``, this rank's tokens. They may be quantized.
            project: Turns n rows of ``x`` into n rows of ``S * D`` columns. Column block i is for SP rank i.
            width: ``S * D``.

        Returns:
            ``[S * T_local, D]``: this rank's columns of the tokens of all ranks, in SP order, in the type of
            ``project``'s results.
        """

    @abstractmethod
    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        """Scatter the tokens and gather the heads (the inverse of :meth:`scatter_heads`), then project.

        Args:
            x: ``[T, D]``, this rank's columns of all tokens. If T is not a multiple of S, zeros pad it.
            project: Turns n of this rank's tokens, in rows of ``S * D`` columns, into n rows. Column block i came
                from SP rank i.

        Returns:
            ``[ceil(T / S), h]``: the projected rows of all of this rank's tokens.
        """

    @abstractmethod
    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        """Send block i to rank i, and wait for one block of each rank.

        Args:
            blocks: ``[S, ...]``, contiguous.

        Returns:
            ``[S, ...]``. Block j came from rank j.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to free)
        """Free the memory that ranks share for the exchange. Collective: all ranks of the group call it, or none."""

    def row_bytes(self, columns: int, element_size: int) -> int:
        """The bytes that the exchange sends for a token of ``columns`` activations of ``element_size`` bytes."""
        return columns + SCALE_BYTES if self.fp8 else columns * element_size


@dataclass(frozen=True)
class ExchangeVolume:
    """How much the exchanges around attention send in one SP step. The all-to-all of the embedding does not count.

    Attributes:
        sp_size: S.
        calls: The number of exchanges, two for each layer.
        token_bytes: The bytes of one token in all layers together. They are this rank's columns of Q, K, V and O.
    """

    sp_size: int
    calls: int
    token_bytes: int

    def bytes_sent(self, tokens: int) -> int:
        """The bytes that a rank sends to other ranks in a step of T tokens: ``(S - 1) * ceil(T / S) * token_bytes``.

        For a step that replays a CUDA graph, T is the size of the graph.
        """
        return (self.sp_size - 1) * padded_local_tokens(tokens, self.sp_size) * self.token_bytes


@dataclass
class ExchangeCounter:
    """Counts the exchanges since the start.

    Attributes:
        volume: How much the exchanges of one step send.
        calls: The number of exchanges so far.
        bytes_sent: The bytes that this rank has sent to other ranks so far.
    """

    volume: ExchangeVolume
    calls: int = 0
    bytes_sent: int = 0

    def count(self, tokens: int) -> None:
        """Count the exchanges of an SP step of ``tokens``, which include the padding to the size of a graph."""
        self.calls += self.volume.calls
        self.bytes_sent += self.volume.bytes_sent(tokens)
