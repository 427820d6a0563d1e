"""Four schedulers go through all pairs of levels under traffic. Each request gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import pytest
from families import WIDE, Family, make_model
from instance_trial import Output, outputs_of_stock, prompt, started
from instance_walk import ALL_PAIRS, Walk

# With the slot that holds no token, a multiple of the ranks. In a large cache, all pages find a place after a split.
LARGE, SMALL = ("--max-total-tokens", "8191"), ("--max-total-tokens", "1535")
NORMAL = "--disable-overlap-schedule"
OPTIONS = [{}, {"stream": False}, {"return_logprob": True}, {"extra_key": "tenant"}]
PLAIN = {name for options in OPTIONS for name in options}  # these do not change the tokens
# With overlap scheduling, SGLang's penalties count other tokens if the steps of other requests come between.
PENALTIES = [{"frequency_penalty": 0.5, "min_new_tokens": 8}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.6}]
COMMON = prompt(99, 30)  # some prompts begin alike


def requests(seed: int, options: list[dict]) -> Iterator[tuple[str, list[int], int, dict]]:
    rng = random.Random(seed)
    for number in range(10_000):
        ids = (COMMON if number % 3 == 0 else []) + prompt(1000 * seed + number, rng.randrange(5, 150))
        yield f"r{number}", ids, rng.randrange(10, 40), options[number % len(options)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    make_model(folder, Family("LlamaConfig", [], {"num_key_value_heads": 4, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("wide"))
    make_model(folder, Family("LlamaConfig", [], WIDE))
    return folder


class Stock:
    """What requests get alone on stock SGLang at TP=1. Walks with the same seed send the same, which is asked once."""

    def __init__(self) -> None:
        self.outputs: dict[str, Output] = {}

    def outputs_of(self, model: str, sent: Mapping[str, tuple[list[int], int, dict]]) -> dict[str, Output]:
        """Return the outputs by the ids of the requests. All of them have logprobs."""
        keys, missing = {}, {}
        for rid, (ids, tokens, options) in sent.items():
            sampling = {name: value for name, value in options.items() if name not in PLAIN}
            keys[rid] = repr((model, ids, tokens, sampling))
            if keys[rid] not in self.outputs:
                missing[keys[rid]] = ids, tokens, {**sampling, "return_logprob": True}
        if missing:
            self.outputs |= outputs_of_stock(("--model-path", model, *LARGE, NORMAL), missing)
        return {rid: self.outputs[key] for rid, key in keys.items()}


STOCK = Stock()


def run(
    model: str, layouts: Sequence[Sequence[int]], flags: Sequence[str] = (), seed: int = 1, ours: Sequence[str] = ()
) -> Walk:
    """Walk through layouts under traffic, and compare all answers with those of stock SGLang."""
    flags = ("--model-path", model, *LARGE, *flags)
    rng, sent = random.Random(seed), {}
    size = sum(layouts[0])
    with started(size, (*flags, *ours), instances=len(layouts[0])) as world:
        walk, traffic = Walk(world), requests(seed, OPTIONS + PENALTIES * (NORMAL in flags))
        for levels in layouts[1:]:
            fresh = {}
            for _ in range(rng.randrange(1, 5)):
                rid, ids, tokens, options = next(traffic)
                world.submit(rng.choice(world.leaders), rid, ids, tokens, **options)
                if options.get("stream", True):
                    fresh[rid] = rng.randrange(6)
                sent[rid] = ids, tokens, options
            world.wait_tokens(fresh)
            walk.go(levels)
        world.wait_end()
        assert world.problems() == []
    for rid, expected in STOCK.outputs_of(model, sent).items():
        output = world.outputs[rid]
        assert (output.tokens, output.reason) == (expected.tokens, expected.reason), f"{rid} {sent[rid]}"
        logprobs = expected.logprobs if "return_logprob" in sent[rid][2] else []
        assert output.logprobs == pytest.approx(logprobs, abs=1e-4)
    return walk


def test_all_pairs_of_levels(model):
    walk = run(model, ALL_PAIRS)
    assert walk.changes >= 11
    assert walk.recomputed == 0


def test_all_pairs_of_levels_with_weights_that_are_freed(wide_model):
    walk = run(wide_model, ALL_PAIRS, seed=5, ours=("--merge-weights", "free"))
    assert walk.changes >= 11
    assert walk.recomputed == 0


def test_pages_of_several_tokens(model):
    """A page that is not full is computed again."""
    flags = ("--page-size", "16", "--max-total-tokens", "2032", NORMAL)
    walk = run(model, [(1, 1), (2,), (1, 1), (2,), (1, 1), (2,)], flags, seed=2)
    assert 0 < walk.recomputed < 16 * 20 * walk.changes


@pytest.mark.full
@pytest.mark.parametrize(("schedule", "changes"), [((), 120), ((NORMAL,), 50), (("--enable-mixed-chunk",), 50)])
def test_a_long_walk(model, schedule, changes):
    """With the walks of the other tests, these are more than 300 changes."""
    rng = random.Random(str(schedule))
    kinds = [(1, 1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2), (4,)]
    layouts = [kinds[0]]
    while len(layouts) < changes * 4 // 5:
        layouts.append(rng.choice([each for each in kinds if each != layouts[-1]]))
    walk = run(model, layouts, schedule, seed=3)
    assert walk.changes >= changes
    assert walk.recomputed == 0


@pytest.mark.parametrize("merge", ["keep", pytest.param("free", marks=pytest.mark.full)])
def test_weights_that_two_ranks_divide(wide_model, merge):
    """The smallest instances have two ranks, which hold the weights together."""
    ours = ("--sp-size", "2", "--merge-weights", merge)
    walk = run(wide_model, [(2, 2), (4,)] * 5, seed=6, ours=ours)
    assert walk.changes >= 9
    assert walk.recomputed == 0


@pytest.mark.full
def test_a_cache_that_is_full(model):
    """Requests that find no room after a split compute the rest again."""
    walk = run(model, ALL_PAIRS * 2, SMALL, seed=4)
    assert walk.recomputed > 0 and walk.dropped > 0
