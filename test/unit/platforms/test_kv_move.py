"""What moves for a prefix that ranks divide by token: the queries, or the prefix."""

from __future__ import annotations

import pytest
from sglang_shift.platforms.kv_move import Move, MoveRule


def rule(heads, kv_heads, shards, width=128, element=2, kv_element=2, lse=0):
    return MoveRule(shards, heads * (2 * width * element + lse), kv_heads * 2 * width * kv_element)


@pytest.mark.parametrize(
    ("new", "prefix", "move"),
    [
        (1, 0, Move.NOTHING),
        (8192, 0, Move.NOTHING),
        (1, 131072, Move.QUERIES),  # a decode in a mixed step
        (8192, 8192, Move.KEYS),
        (8192, 131072, Move.KEYS),  # equal: 8192 * 8 * 2 = 131072
        (8192, 131074, Move.QUERIES),
        (1, 16, Move.KEYS),
        (1, 17, Move.QUERIES),
    ],
)
def test_the_move_with_fewer_bytes(new, prefix, move):
    """With 8 query heads and a KV head a rank, and D = 2, queries move if new * 8 * 2 < prefix."""
    assert rule(8, 1, 2).choose(new, prefix) is move


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize(("element", "kv_element", "lse"), [(2, 2, 0), (4, 4, 4), (2, 1, 4)])
def test_no_other_move_has_fewer_bytes(shards, heads, element, kv_element, lse):
    """Count the bytes that a rank sends, by hand."""
    chosen = rule(heads, 1, shards, 64, element, kv_element, lse)
    for new in (1, 5, 64, 513):
        for prefix in (1, 7, 100, 1000, 5000, 40000):
            there = new * heads * 64 * element * (shards - 1)
            back = new * heads * (64 * element + lse) * (shards - 1)
            shard = (prefix + shards - 1) // shards * 2 * 64 * kv_element * (shards - 1)
            sent = {Move.QUERIES: there + back, Move.KEYS: shard}
            assert sent[chosen.choose(new, prefix)] == min(sent.values())


def test_a_cache_of_fewer_bytes_moves_earlier():
    assert rule(8, 1, 2).choose(100, 2000) is Move.QUERIES
    assert rule(8, 1, 2, kv_element=1).choose(100, 2000) is Move.KEYS
