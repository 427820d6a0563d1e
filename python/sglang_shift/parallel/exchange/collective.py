"""The Ulysses exchange: all-to-all between "my tokens, all heads" and "all tokens, my heads".

Ulysses sequence parallelism is arXiv 2309.14509; both directions move the same bytes:
``(S - 1) / S`` of what a rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import sglang_shift_kernels as kernels
import torch
import torch.distributed as dist
from sglang_shift_kernels.layout import SCALE_BYTES

Matmul = Callable[[torch.Tensor], torch.Tensor]

# On a CPU, a smaller part takes more time to handle than it hides; and the more parts there are, the
# fewer rows has each one's matmul, which gets slow with few.
PART_BYTES = 256 << 10
MOST_PARTS = 4
MESSAGE_BYTES = 16 << 10
"""From blocks of this size on, a CPU's exchange is of single messages."""


class Group(Protocol):
    """What the exchange needs of SGLang's ``GroupCoordinator``."""

    world_size: int
    rank_in_group: int
    device_group: Any

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Block i of ``input`` goes to rank i; block j of ``output`` came from rank j."""


@dataclass
class Pending:
    """Blocks on their way: ``received`` has them once all of ``works`` are done."""

    received: torch.Tensor
    works: Sequence[dist.Work] = ()

    def wait(self) -> torch.Tensor:
        """The blocks, arrived."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass
class SequenceExchange:
    """Exchange over one SP group, by ``all_to_all_single`` with a pack or unpack copy.

    The matmul beside the exchange is given to it, so that a large exchange can be made in parts: one
    is sent while the next is computed, or received while the one before is.

    Attributes:
        group: The SP group of S ranks.
        fp8: Whether Q, K, V and O travel as fp8 (:mod:`sglang_shift_kernels.fp8`).
        bytes_sent: Bytes this rank has sent to other ranks so far.
        calls: Exchanges so far.
    """

    group: Group
    fp8: bool = False
    bytes_sent: int = field(default=0, init=False)
    calls: int = field(default=0, init=False)

    def scatter_heads(self, x: torch.Tensor, project: Matmul, width: int) -> torch.Tensor:
        """Project, then gather the tokens and scatter the heads.

        Args:
            x: ``[T_local, h]``: this rank's tokens.
            project: Some rows of ``x`` to as many of ``S * D`` columns; column block i is for SP rank i.
            width: ``S * D``.

        Returns:
            ``[S * T_local, D]``: the tokens of all ranks in SP order, this rank's columns.
        """
        size = self.group.world_size
        row_bytes = width // size + SCALE_BYTES if self.fp8 else width // size * x.element_size()
        pending = []
        for part in x.tensor_split(self._parts(x.device, x.shape[0] * size * row_bytes)):
            pending.append(self._start(kernels.pack_heads(project(part), size, fp8=self.fp8)))
        self.calls += 1
        return kernels.unpack_tokens(joined([p.wait() for p in pending], dim=1), x.dtype)

    def gather_heads(self, x: torch.Tensor, project: Matmul) -> torch.Tensor:
        """Scatter the tokens and gather the heads (the inverse of what :meth:`scatter_heads` does), then project.

        Args:
            x: ``[T, D]``: all tokens, this rank's columns; where T is no multiple of S, zeros pad it.
            project: Some of this rank's tokens in ``S * D`` columns, where column block i came from SP
                rank i, to as many rows.

        Returns:
            ``[ceil(T / S), h]``: all of this rank's tokens, projected.
        """
        blocks = kernels.pack_tokens(x, self.group.world_size, fp8=self.fp8)
        parts = blocks.tensor_split(self._parts(x.device, blocks.nbytes), dim=1)
        pending = [self._start(part.contiguous()) for part in parts]
        self.calls += 1
        return joined([project(kernels.unpack_heads(p.wait(), x.dtype)) for p in pending])

    @property
    def text(self) -> str:
        """Which backend this is, in a few words."""
        return "collective, fp8" if self.fp8 else "collective"

    def close(self) -> None:
        """Free what ranks share for this. Collective: all ranks of the group call it, or none."""

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Exchanges inside do not count: they serve no request."""
        counts = self.bytes_sent, self.calls
        try:
            yield
        finally:
            self.bytes_sent, self.calls = counts

    def _parts(self, device: torch.device, size: int) -> int:
        """In how many parts to exchange blocks of ``size`` bytes in all: the same on every rank.

        One on a GPU: PyNccl, which SGLang may use there, has nothing to wait for later.
        """
        if device.type != "cpu":
            return 1
        return max(1, min(MOST_PARTS, self._bytes_to_others(size) // PART_BYTES))

    def _bytes_to_others(self, size: int) -> int:
        """Of blocks of ``size`` bytes in all."""
        return size * (self.group.world_size - 1) // self.group.world_size

    def all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        """Send block i to rank i, wait, and get as many; not counted as an exchange.

        Args:
            blocks: ``[S, ...]``, contiguous.

        Returns:
            ``[S, ...]``: block j came from rank j.
        """
        return self._all_to_all(blocks).wait()

    def _start(self, blocks: torch.Tensor) -> Pending:
        self.bytes_sent += self._bytes_to_others(blocks.nbytes)
        return self._all_to_all(blocks)

    def _all_to_all(self, blocks: torch.Tensor) -> Pending:
        received = torch.empty_like(blocks)
        if blocks.device.type == "cpu" and blocks.numel() * blocks.element_size() >= MESSAGE_BYTES * len(blocks):
            return Pending(received, self._send_and_receive(blocks, received))
        # Flat: PyNccl splits by element count, gloo by the first dimension; both agree on 1-D.
        self.group.all_to_all_single(received.view(-1), blocks.view(-1))
        return Pending(received)

    def _send_and_receive(self, blocks: torch.Tensor, received: torch.Tensor) -> list[dist.Work]:
        """An all-to-all of single messages. Gloo's own sends first and then receives: large ones take twice as long."""
        me, group = self.group.rank_in_group, self.group.device_group
        others = [rank for rank in range(self.group.world_size) if rank != me]
        works = [dist.irecv(received[rank], group=group, group_src=rank) for rank in others]
        works += [dist.isend(blocks[rank], group=group, group_dst=rank) for rank in others]
        received[me] = blocks[me]
        return works


def joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The parts, one after the other; no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
