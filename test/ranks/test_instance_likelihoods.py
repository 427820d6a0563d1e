"""The likelihood of given tokens after each change of the levels is that of stock SGLang on one rank.

Greedy tokens stay the same if all logits are wrong by a little. The log-probabilities of given tokens do not. Each
instance is asked, also one that was idle during the change. Its prefixes in the KV cache have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from families import Family, make_model
from instance_trial import Output, World, prompt, started
from instance_walk import ALL_PAIRS, Walk

POOL = ("--max-total-tokens", "8191")
PREFIX = 60  # tokens that are in the KV cache before a change
TOLERANCE = 1e-4

# Decodes, and prompts of up to 8 tokens, run in TP at all levels. Longer prompts run in SP at the levels above 1.
CONTINUATIONS = {"in TP": 7, "in SP": 30}


@dataclass(frozen=True)
class Forced:
    """A request whose tokens are given.

    Attributes:
        ids: Its tokens.
        given: How many of the last ones get log-probabilities. What comes before may be in the KV cache.
    """

    ids: list[int]
    given: int

    def submit(self, world: World, leader: int, rid: str, *, given: int | None = None) -> None:
        start = len(self.ids) - (self.given if given is None else given)
        world.submit(leader, rid, self.ids, 1, return_logprob=True, logprob_start_len=start)


def prefix_of(change: int) -> list[int]:
    return prompt(500 + change, PREFIX)


def forced_after(change: int, leader: int) -> dict[str, Forced]:
    """What an instance is asked after a change: tokens behind a prefix that has moved, and a whole prompt."""
    name = f"{change} on {leader}"
    requests = {
        f"{kind} {name}": Forced(prefix_of(change) + prompt(900 + 10 * change + leader, count), count)
        for kind, count in CONTINUATIONS.items()
    }
    return {**requests, f"whole {name}": Forced(ids := prompt(2000 + 10 * change + leader, 40), len(ids))}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    make_model(folder, Family("LlamaConfig", [], {"num_key_value_heads": 4, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def stock(model) -> Callable[[Mapping[str, Forced]], dict[str, list[float | None]]]:
    """A function that returns the log-probabilities of all tokens of requests on stock SGLang, one after the other.

    Each request is asked once: idle and busy instances are asked the same.
    """
    outputs: dict[str, Output] = {}

    def log_probabilities(asked: Mapping[str, Forced]) -> dict[str, list[float | None]]:
        if missing := {rid: forced for rid, forced in asked.items() if rid not in outputs}:
            with started(1, ("--model-path", model, *POOL, "--disable-radix-cache")) as alone:
                for rid, forced in missing.items():
                    forced.submit(alone, 0, rid, given=len(forced.ids))
                    alone.wait_end([rid])
                outputs.update(alone.outputs)
        return {rid: outputs[rid].input_logprobs for rid in asked}

    return log_probabilities


@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.full), True], ids=["idle", "busy"])
def test_likelihoods_after_each_change(model, stock, busy):
    """All pairs of levels of four ranks. With ``busy``, one instance decodes a request during each change."""
    asked: dict[str, Forced] = {}
    flags = ("--model-path", model, *POOL)
    with started(4, flags, instances=4) as world:
        walk = Walk(world)
        for change, layout in enumerate(ALL_PAIRS[1:]):
            world.submit(world.leaders[change % len(world.leaders)], f"prefix {change}", prefix_of(change), 1)
            world.wait_end()
            if busy:
                world.submit(world.leaders[0], f"busy {change}", prompt(3000 + change, 30), 80)
                world.wait_tokens({f"busy {change}": 3})
            walk.go(layout)
            for leader in world.leaders:
                for rid, forced in forced_after(change, leader).items():
                    forced.submit(world, leader, rid)
                    world.wait_end([rid])  # alone in its step, so that its tokens decide the mode
                    asked[rid] = forced
            world.wait_end()
            kept = [world.outputs[f"in TP {change} on {leader}"].cached for leader in world.leaders]
            assert max(kept) == PREFIX, "the prefix moved with the change"
        answers = {rid: world.outputs[rid].input_logprobs for rid in asked}
    expected = stock(asked)
    for rid, forced in asked.items():
        count = forced.given - 1  # the first one needs the token before it, which was not computed
        assert answers[rid][-count:] == pytest.approx(expected[rid][-count:], abs=TOLERANCE), rid
