"""Decides what crosses between the ranks that share a prefix: the queries of its request, or the prefix itself.

If a request's KV cache is divided by token, a rank has 1/D of the prefix, and D - 1 other ranks have the rest. Either
the new tokens' queries go to the other ranks, and partial outputs come back. Or the prefix comes to the queries. Both
give the same result, and the ranks compute the same number of scores. So the bytes decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Move(Enum):
    """What crosses for one request in one step."""

    NOTHING = "nothing"
    QUERIES = "queries"
    KEYS = "keys"


@dataclass(frozen=True)
class MoveRule:
    """Chooses the move with fewer bytes. All D ranks choose alike, because they see the same lengths.

    Attributes:
        shards: D, the ranks among which a prefix is divided.
        query_bytes: What crosses for a new token: the queries of a rank's heads to another rank, and their partial
            outputs with the log-sum-exp back.
        key_bytes: What crosses for a cached token: the key and the value of a rank's KV heads.
    """

    shards: int
    query_bytes: int
    key_bytes: int

    def choose(self, new: int, prefix: int) -> Move:
        """Return the move for a request with ``new`` tokens after a prefix of ``prefix`` tokens.

        A rank sends either the queries of all new tokens or its shard of the prefix, each to D - 1 other ranks. If
        queries, keys and values are equally wide, queries move if ``new * heads * D < prefix * KV heads``.
        """
        if prefix == 0:
            return Move.NOTHING
        shard = -(-prefix // self.shards)
        return Move.QUERIES if new * self.query_bytes < shard * self.key_bytes else Move.KEYS
