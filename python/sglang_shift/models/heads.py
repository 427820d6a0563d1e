"""Computes how ranks divide the heads of an attention layer. The rule for KV heads is only here."""

from __future__ import annotations

from dataclasses import dataclass


def kv_heads_of_rank(kv_heads: int, ranks: int) -> int:
    """Return the KV heads of each rank. If there are fewer KV heads than ranks, each KV head is on several ranks.

    This is the rule of SGLang's ``QKVParallelLinear``.
    """
    return max(1, kv_heads // ranks)


@dataclass(frozen=True)
class Heads:
    """Heads of one layer, of the whole model or of a rank.

    Attributes:
        query: Number of query heads.
        kv: Number of key heads, which is also the number of value heads.
    """

    query: int
    kv: int

    @property
    def qkv(self) -> int:
        """Number of heads that a fused QKV projection gives."""
        return self.query + 2 * self.kv

    def of_rank(self, ranks: int) -> Heads:
        """Return the heads of each rank, if ``ranks`` ranks divide these heads in TP."""
        return Heads(self.query // ranks, kv_heads_of_rank(self.kv, ranks))

    def of_base_rank(self, ranks: int, sp_size: int) -> Heads:
        """Return the heads in a rank's base weights: the TP shards of ``sp_size`` ranks, side by side.

        Each shard keeps its own copy of a KV head that is on several ranks.
        """
        shard = self.of_rank(ranks)
        return Heads(sp_size * shard.query, sp_size * shard.kv)

    def divides_queries(self, ranks: int) -> bool:
        """Return whether every rank gets the same number of query heads."""
        return self.query % ranks == 0

    def divides_kv(self, ranks: int) -> bool:
        """Return whether every rank gets equally many KV heads, or every KV head is on equally many ranks."""
        return self.kv % ranks == 0 or ranks % self.kv == 0
