"""Divides the query heads of a rank into groups, and moves each group between rows and blocks.

By rows, an exchange cannot overlap with attention: a token attends to tokens of all ranks. By heads it can: a group
needs the keys and values of its KV heads, and its own queries. So K and V travel with the first group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_shift.models.heads import Heads

MAX_GROUPS = 4
"""The most groups. Each group has messages and a call of attention of its own."""


@dataclass(frozen=True)
class HeadGroups:
    """The groups of heads of one attention layer.

    Each group has some of the query heads of every KV head, and equally many of each. So attention of a group reads the
    whole KV cache of the layer, as attention of all heads does. Groups differ by at most one query head of a KV head.

    Attributes:
        heads: The heads of a rank in full TP.
        width: The columns of a head.
        count: The number of groups.
    """

    heads: Heads
    width: int
    count: int

    @classmethod
    def of(cls, heads: Heads, width: int) -> HeadGroups:
        """Divide the heads into as many groups as possible, up to :data:`MAX_GROUPS`."""
        return cls(heads, width, min(MAX_GROUPS, heads.query // heads.kv))

    @property
    def sharing(self) -> int:
        """The number of query heads that share a KV head."""
        return self.heads.query // self.heads.kv

    @property
    def query_columns(self) -> int:
        """q, the columns of all queries of a rank."""
        return self.width * self.heads.query

    def share(self, group: int) -> slice:
        """Which of the query heads that share a KV head are in a group."""
        first, end = (self.sharing * each // self.count for each in (group, group + 1))
        return slice(first, end)

    def query_heads(self, group: int) -> int:
        """The number of query heads of a group."""
        share = self.share(group)
        return self.heads.kv * (share.stop - share.start)

    def columns(self, group: int) -> int:
        """The columns of a group: its queries, and for the first group all keys and values."""
        return self.width * (self.query_heads(group) + (2 * self.heads.kv if group == 0 else 0))

    def pack(self, projected: torch.Tensor, group: int, blocks: torch.Tensor) -> None:
        """Copy the columns of a group, for each rank, to its block.

        Args:
            projected: ``[n, S * (q + k + v)]``, tokens of this rank. Column block s is for rank s.
            group: The group.
            blocks: ``[S, n, columns of the group]``.
        """
        rows, size = projected.shape[0], blocks.shape[0]
        mine = self.width * self.query_heads(group)
        by_rank = projected.reshape(rows, size, -1).transpose(0, 1)
        self._queries(by_rank[..., : self.query_columns], group, blocks[..., :mine], to_all=False)
        if group == 0:
            blocks[..., mine:] = by_rank[..., self.query_columns :]

    def unpack(self, received: torch.Tensor, group: int, rows: torch.Tensor) -> None:
        """Copy the output of a group of all ranks' heads to its columns.

        Args:
            received: ``[S, n, output columns of the group]``. Block s has the heads of rank s.
            group: The group.
            rows: ``[n, S * q]``, tokens of this rank.
        """
        by_rank = rows.view(rows.shape[0], received.shape[0], -1).transpose(0, 1)
        self._queries(by_rank, group, received, to_all=True)

    def _queries(self, whole: torch.Tensor, group: int, part: torch.Tensor, *, to_all: bool) -> None:
        """Copy between all query heads, ``[S, n, q]``, and those of a group, ``[S, n, q of the group]``."""
        share = self.share(group)
        mine = whole.unflatten(-1, (self.heads.kv, self.sharing, self.width))[..., share, :]
        group_part = part.unflatten(-1, (self.heads.kv, share.stop - share.start, self.width))
        if to_all:
            mine.copy_(group_part)
        else:
            group_part.copy_(mine)
