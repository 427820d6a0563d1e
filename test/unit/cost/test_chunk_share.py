"""Long prompts and short prompts share steps."""

from __future__ import annotations

import random

from sglang_shift.cost.chunk_share import ChunkShare
from sglang_shift.modes import PENDING_REQUESTS


def share_with(credit: int) -> ChunkShare:
    share = ChunkShare()
    share.continue_long(credit, 10**6)
    return share


def test_the_first_step_is_the_long_prompts():
    assert ChunkShare().chosen(1000, [1, 2, 3]) == []


def test_prompts_that_fit_whole_in_their_order():
    assert share_with(500).chosen(1000, [400, 1000, 90, 10, 20]) == [0, 2, 3]
    assert share_with(500).chosen(1000, [400, 200, 90]) == [0], "the second one waits for credit, and none passes it"
    assert share_with(5000).chosen(1000, [400, 599, 1]) == [0, 1]
    assert share_with(5000).chosen(1000, [1000], least=1) == []
    assert share_with(5000).chosen(1000, [64, 936], least=64) == [0]
    assert share_with(5000).chosen(0, [1]) == []


def test_only_the_first_prompts_of_the_queue_count():
    assert share_with(5000).chosen(1000, [2000] * PENDING_REQUESTS + [1]) == []


def test_the_credit_has_a_bound_and_ends_with_the_long_prompt():
    share = ChunkShare()
    for _ in range(5):
        share.continue_long(300, 1000)
    assert share.credit == 1000
    share.take(1200)  # a cached prefix may have been lost since the prompt was chosen
    assert share.credit == 0
    share.continue_long(300, 1000)
    share.reset()
    assert share.credit == 0


def test_the_others_never_get_more_than_the_long_prompt_and_none_starves():
    rng, share, room = random.Random(4), ChunkShare(), 1000
    queue = [rng.randint(1, 900) for _ in range(2000)]
    waits = [0] * len(queue)
    indices = list(range(len(queue)))
    long = short = 0
    while indices:
        chosen = {indices[k] for k in share.chosen(room, (queue[i] for i in indices))}
        beside = sum(queue[i] for i in chosen)
        share.continue_long(room - beside, room)
        share.take(beside)
        long, short = long + room - beside, short + beside
        assert short <= long
        indices = [i for i in indices if i not in chosen]
        for i in indices[:1]:
            waits[i] += 1
    assert long < 2.5 * short
    assert max(waits) <= 2, "the first of the queue waits for two steps at most"
