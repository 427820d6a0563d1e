"""A rank fails in one phase of a change of the level. Either all go on as before, or all ranks end. None waits."""

from __future__ import annotations

import pytest
from instance_faults import RANK, plant, watch
from instance_trial import World, prompt, started, tokens_of_stock
from sglang_shift.models.demo import demo_model_path

MODEL = ("--model-path", demo_model_path(), "--max-total-tokens", "1023")
REQUESTS = {f"q{n}": (prompt(n, 20 + 7 * n), 60 + n) for n in range(4)}
MERGE, SPLIT = 2, 1


@pytest.fixture(scope="module")
def alone():
    """The tokens of each request, one after the other on stock SGLang."""
    return tokens_of_stock(MODEL, REQUESTS)


def submit_all(world: World) -> None:
    for number, (rid, (ids, tokens)) in enumerate(REQUESTS.items()):
        world.submit(world.leaders[number % len(world.leaders)], rid, ids, tokens)
    world.wait_tokens(dict.fromkeys(REQUESTS, 4))


@pytest.mark.parametrize("level", [MERGE, SPLIT], ids=["merge", "split"])
def test_a_failure_before_the_vote_gives_the_change_up(alone, level):
    """The requests go on, and the next try succeeds."""
    phases = ["check", "gather", "plan"] if level == MERGE else ["check", "plan"]
    with started(2, MODEL, instances=2) as world:
        if level == SPLIT:
            assert world.change(0, 2, MERGE).ok
        submit_all(world)
        for number, phase in enumerate(phases):
            world.call(plant, phase, "memory")
            refused = world.change(0, 2, level)
            assert not refused.ok and refused.bytes_sent == 0
            assert refused.reason == f"rank {RANK} failed with OutOfMemoryError: planted: there is no memory"
            world.wait_tokens(dict.fromkeys(REQUESTS, 8 + 4 * number))
        assert world.change(0, 2, level).ok
        assert world.wait_end() == alone
        assert world.problems() == []


FATAL = [
    *((phase, "kill") for phase in ("check", "quiesce", "gather", "plan", "exchange", "rebuild")),
    *((phase, "hang") for phase in ("check", "quiesce", "gather", "plan", "exchange", "rebuild")),
    *((phase, "memory") for phase in ("quiesce", "exchange", "rebuild")),
]
FAST = {("plan", "kill"), ("exchange", "memory")}


def fail_in(world, alone, phase, fault, level):
    """Let a rank fail in a phase of a change under traffic. All ranks must end."""
    submit_all(world)
    if fault == "hang":
        world.call(watch)
    world.call(plant, phase, fault)
    world.ask(0, 2, level)
    world.wait_failure()
    for rid, output in world.outputs.items():
        assert output.tokens == alone[rid][: len(output.tokens)], "no wrong token was sent"


@pytest.mark.parametrize(
    ("phase", "fault"), [pytest.param(*each, marks=[] if each in FAST else pytest.mark.full) for each in FATAL]
)
def test_all_ranks_end_with_one_that_fails(alone, phase, fault):
    """A killed rank closes its connections. A rank that hangs is ended by SGLang's watchdog."""
    with started(2, MODEL, instances=2) as world:
        fail_in(world, alone, phase, fault, MERGE)


@pytest.mark.full
@pytest.mark.parametrize(("phase", "fault"), [("check", "kill"), ("plan", "hang"), ("exchange", "kill")])
def test_all_ranks_end_with_one_that_fails_in_a_split(alone, phase, fault):
    with started(2, MODEL, instances=2) as world:
        assert world.change(0, 2, MERGE).ok
        fail_in(world, alone, phase, fault, SPLIT)
