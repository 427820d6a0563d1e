"""The Ulysses exchange: all-to-all between "my tokens, all heads" and "all tokens, my heads".

Ulysses sequence parallelism is arXiv 2309.14509; both directions move the same bytes:
``(S - 1) / S`` of what a rank holds.
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
    """What an exchange needs of SGLang's ``GroupCoordinator``."""

    world_size: int
    rank_in_group: int
    device_group: Any

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Block i of ``input`` goes to rank i; block j of ``output`` came from rank j."""


class SequenceExchange(ABC):
    """The exchange over one SP group of S ranks.

    The matmul beside the exchange is given to it, so that an implementation may overlap the two.

    Attributes:
        group: The SP group.
        fp8: Whether Q, K, V and O travel as fp8 (:mod:`sglang_shift_kernels.fp8`).
    """

    group: Group
    fp8: bool = False

    @property
    @abstractmethod
    def text(self) -> str:
        """Which implementation this is, in a few words, for the log and ``/server_info``."""

    @abstractmethod
    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        """Project, then gather the tokens and scatter the heads.

        Args:
            x: ``[T_local, h]``: this rank's tokens.
            project: Some rows of ``x`` to as many of ``S * D`` columns; column block i is for SP rank i.
            width: ``S * D``.

        Returns:
            ``[S * T_local, D]``: the tokens of all ranks in SP order, this rank's columns.
        """

    @abstractmethod
    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        """Scatter the tokens and gather the heads (the inverse of what :meth:`scatter_heads` does), then project.

        Args:
            x: ``[T, D]``: all tokens, this rank's columns. If T is no multiple of S, zeros pad it.
            project: Some of this rank's tokens in ``S * D`` columns, where column block i came from SP
                rank i, to as many rows.

        Returns:
            ``[ceil(T / S), h]``: all of this rank's tokens, projected.
        """

    @abstractmethod
    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        """Send block i to rank i, and wait for as many.

        Args:
            blocks: ``[S, ...]``, contiguous.

        Returns:
            ``[S, ...]``: block j came from rank j.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to free)
        """Free what ranks share for this. Collective: all ranks of the group call it, or none."""

    def row_bytes(self, columns: int, element_size: int) -> int:
        """Bytes of a token that travels in ``columns`` columns of activations of ``element_size`` bytes."""
        return columns + SCALE_BYTES if self.fp8 else columns * element_size


@dataclass(frozen=True)
class ExchangeVolume:
    """What the exchanges around attention send in one SP step. The embedding's all-to-all is not among them.

    Attributes:
        sp_size: S.
        calls: Exchanges: two a layer.
        token_bytes: Of one token in all layers: this rank's columns of Q, K, V and O.
    """

    sp_size: int
    calls: int
    token_bytes: int

    def bytes_sent(self, tokens: int) -> int:
        """Bytes that a rank sends to others in a step of ``tokens``: ``(S - 1) * ceil(T / S)`` tokens' worth.

        A step that replays a CUDA graph sends as many tokens as the graph has.
        """
        return (self.sp_size - 1) * padded_local_tokens(tokens, self.sp_size) * self.token_bytes


@dataclass
class ExchangeCounter:
    """Exchanges since the start.

    Attributes:
        volume: Of one step.
        calls: Exchanges so far.
        bytes_sent: Bytes that this rank has sent to others so far.
    """

    volume: ExchangeVolume
    calls: int = 0
    bytes_sent: int = 0

    def count(self, tokens: int) -> None:
        """Count the exchanges of an SP step of ``tokens``, those that pad it to a graph's size included."""
        self.calls += self.volume.calls
        self.bytes_sent += self.volume.bytes_sent(tokens)
