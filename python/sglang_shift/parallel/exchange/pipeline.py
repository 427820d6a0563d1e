"""Exchanges the heads of one layer group by group, so that messages overlap with attention.

The messages of all groups start before the attention of the first group. While attention of a group runs, the queries
of the next groups arrive. The output of a group returns while attention of the next group runs:

    QKV projection | attention of group 0 | attention of group 1 | ...        | output projection
    K, V, group 0  | group 1, group 2 ... | output of group 0    | ...        | output of the last group

The first group also overlaps with the QKV projection, and the output of the last group with the output projection, in
parts by rows. On CPUs the parts have the same rows as in :class:`~sglang_shift.parallel.exchange.gloo.GlooExchange`. So
both ways compute the same matrix products. On GPUs there is one part, as in the ordinary exchange there.

PyTorch sends the messages of NCCL on a stream of their own. They start after the work before them in the step's stream,
and to wait for them means that the step's stream waits: the CPU does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import sglang_shift_kernels as kernels
import torch
import torch.distributed as dist

from sglang_shift.parallel.exchange.base import Group, Matmul
from sglang_shift.parallel.exchange.gloo import number_of_parts
from sglang_shift.parallel.exchange.head_groups import HeadGroups


@dataclass
class _Blocks:
    """Blocks of all ranks that are on their way, in parts by rows.

    Attributes:
        group: The SP group.
        sent: ``[S, n, columns]``. Block i is for rank i.
        received: ``[S, n, columns]``. Block j comes from rank j.
        works: The messages of each part.
    """

    group: Group
    sent: torch.Tensor
    received: torch.Tensor
    works: list[list[dist.Work]] = field(default_factory=list)

    def start(self, rows: slice) -> None:
        """Send these rows of each block, and receive as many."""
        me, group = self.group.rank_in_group, self.group.device_group
        others = [rank for rank in range(self.group.world_size) if rank != me]
        messages = [dist.P2POp(dist.irecv, self.received[rank, rows], group=group, group_peer=rank) for rank in others]
        messages += [dist.P2POp(dist.isend, self.sent[rank, rows], group=group, group_peer=rank) for rank in others]
        # NCCL runs them at once: one after the other, sends and receives of different ranks would wait for each other.
        self.works.append(dist.batch_isend_irecv(messages) if messages else [])
        self.received[me, rows] = self.sent[me, rows]

    def wait(self, part: int) -> None:
        """Wait for the messages of a part."""
        for work in self.works[part]:
            work.wait()


class HeadPipeline:
    """The exchange around the attention of one layer, in one step.

    Call :meth:`scatter`, then for each group :meth:`arrived` and :meth:`send_back`, then :meth:`gather`. All ranks of
    the group do so.

    Args:
        group: The SP group.
        groups: The groups of heads.
        in_parts: Whether the first group and the last output overlap with the projections, in parts by rows.
    """

    def __init__(self, group: Group, groups: HeadGroups, *, in_parts: bool) -> None:
        self.group, self.groups, self.in_parts = group, groups, in_parts
        self._arriving: list[_Blocks] = []
        self._returning: list[_Blocks] = []

    def scatter(self, x: torch.Tensor, project: Matmul, width: int) -> None:
        """Project, and start to send the heads of all groups.

        Args:
            x: ``[T_local, h]``, this rank's tokens.
            project: Turns n rows of ``x`` into n rows of ``S * (q + k + v)`` columns. Column block i is for SP rank i.
            width: ``S * (q + k + v)``.
        """
        for rows in self._parts(x.shape[0], width * x.element_size()):
            projected = project(x[rows])
            if not self._arriving:
                counts = map(self.groups.columns, range(self.groups.count))
                self._arriving = [self._blocks(x.shape[0], columns, projected) for columns in counts]
            for group, blocks in enumerate(self._arriving):
                self.groups.pack(projected, group, blocks.sent[:, rows])
            self._arriving[0].start(rows)
        for blocks in self._arriving[1:]:
            blocks.start(slice(None))

    def arrived(self, group: int) -> torch.Tensor:
        """Wait for a group. Return ``[S * T_local, columns]``: its queries, and for the first group K and V, too."""
        blocks = self._arriving[group]
        for part in range(len(blocks.works)):
            blocks.wait(part)
        return blocks.received.flatten(0, 1)

    def send_back(self, group: int, output: torch.Tensor) -> None:
        """Start to send the output of a group's attention, ``[T, columns]``, to the ranks of its tokens."""
        packed = kernels.pack_tokens(output, self.group.world_size)
        blocks = _Blocks(self.group, packed, torch.empty_like(packed))
        self._returning.append(blocks)
        for rows in self._last_parts(blocks) if group == self.groups.count - 1 else [slice(None)]:
            blocks.start(rows)

    def gather(self, project: Matmul) -> torch.Tensor:
        """Wait for the outputs of all groups, and project them.

        Args:
            project: Turns n of this rank's tokens, in rows of ``S * q`` columns, into n rows. Column block i came from
                SP rank i.

        Returns:
            ``[T_local, h]``.
        """
        *early, last = self._returning
        size, rows, _ = last.received.shape
        heads = last.received.new_empty(rows, size * self.groups.query_columns)
        for group, blocks in enumerate(early):
            blocks.wait(0)
            self.groups.unpack(blocks.received, group, heads)
        results = []
        for part, some in enumerate(self._last_parts(last)):
            last.wait(part)
            self.groups.unpack(last.received[:, some], len(early), heads[some])
            results.append(project(heads[some]))
        return results[0] if len(results) == 1 else torch.cat(results)

    def _last_parts(self, last: _Blocks) -> list[slice]:
        size, rows, _ = last.received.shape
        return self._parts(rows, size * self.groups.query_columns * last.received.element_size())

    def _blocks(self, rows: int, columns: int, like: torch.Tensor) -> _Blocks:
        shape = (self.group.world_size, rows, columns)
        return _Blocks(self.group, like.new_empty(shape), like.new_empty(shape))

    def _parts(self, rows: int, row_bytes: int) -> list[slice]:
        """The rows of each part, if a row of all heads of all ranks has ``row_bytes``. They are equal on every rank."""
        count = min(rows, number_of_parts(rows * row_bytes, self.group.world_size)) if self.in_parts else 1
        each, more = divmod(rows, count)
        ends = list(accumulate(each + (part < more) for part in range(count)))
        return [slice(start, end) for start, end in pairwise([0, *ends])]
