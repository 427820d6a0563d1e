"""Schedulers that merge and split while requests run: each request gets the tokens that it gets alone on stock TP=1."""

from __future__ import annotations

import pytest
from instance_trial import World, prompt, started
from sglang_shift.models.demo import demo_model_path

POOL = ("--max-total-tokens", "1023")  # with the slot that holds no token, a multiple of the ranks
MODEL = ("--model-path", demo_model_path())
REQUESTS = {f"q{n}": (prompt(n, 20 + 7 * n), 40 + n) for n in range(6)}


@pytest.fixture(scope="module")
def alone():
    """The tokens of each request, one after the other on stock SGLang."""
    with started(1, (*MODEL, *POOL, "--disable-radix-cache")) as world:
        for rid, (ids, tokens) in REQUESTS.items():
            world.submit(0, rid, ids, tokens)
            world.wait_end([rid])
        return {rid: output.tokens for rid, output in world.outputs.items()}


def submit_all(world: World) -> None:
    for number, (rid, (ids, tokens)) in enumerate(REQUESTS.items()):
        world.submit(number % world.size, rid, ids, tokens)


@pytest.mark.parametrize("schedule", [(), ("--disable-overlap-schedule",)], ids=["overlap", "normal"])
def test_merge_and_split_with_requests_in_flight(alone, schedule):
    with started(2, (*MODEL, *POOL, *schedule), instances=2) as world:
        submit_all(world)
        world.wait_tokens(dict.fromkeys(REQUESTS, 5))
        merged = world.change(0, 2, 2)
        assert merged.ok and merged.tokens_recomputed == merged.tokens_dropped == 0 and merged.bytes_sent > 0
        world.wait_tokens(dict.fromkeys(REQUESTS, 15))
        split = world.change(0, 2, 1)
        assert split.ok and split.tokens_recomputed == split.tokens_dropped == 0 and split.bytes_sent > 0
        assert world.wait_end() == alone
