"""The ledger: what each instance serves, before and after changes."""

from __future__ import annotations

import random

import pytest
from sglang_shift.cost.deployment import InstancePolicy
from sglang_shift.instances.changes import Change
from sglang_shift.instances.ledger import Ledger
from sglang_shift.instances.levels import Instance, Levels


@pytest.fixture
def ledger():
    ledger = Ledger.at(Levels((1, 2, 4)))
    ledger.capacities = {1: 100, 2: 200, 4: 400}
    return ledger


def place(ledger: Ledger, rid: str, need: int) -> int | None:
    """Place a request as a server does, and return the first rank of its instance."""
    index = InstancePolicy().route(ledger.deployment(0.0), need)
    if index is None:
        return None
    ledger.place(rid, ledger.layout[index], need)
    return ledger.layout[index].leader


def test_requests_go_to_the_instance_with_the_least_load(ledger):
    assert [place(ledger, rid, need) for rid, need in (("a", 50), ("b", 10), ("c", 20), ("d", 5))] == [0, 1, 2, 3]
    assert place(ledger, "e", 10) == 3
    ledger.end(["a", "unknown"])
    assert place(ledger, "f", 10) == 0


def test_only_an_instance_that_holds_a_request_gets_it(ledger):
    assert place(ledger, "long", 150) is None and ledger.level_for(150) == 2 and ledger.largest == 100
    ledger.apply(Change(Instance(2, 1), 2))
    assert ledger.leaders == [0, 1, 2] and ledger.largest == 200
    assert place(ledger, "long", 150) == 2
    assert ledger.level_for(401) is None


def test_ranks_that_change_get_nothing(ledger):
    ledger.busy = range(2, 4)
    assert {place(ledger, str(i), 10) for i in range(4)} == {0, 1}
    ledger.busy = range(4)
    assert place(ledger, "more", 10) is None


def test_requests_follow_their_ranks(ledger):
    for rid in "abcd":
        place(ledger, rid, 10)
    ledger.apply(Change(Instance(4, 0), 4))
    ledger.held_by(2, ["d"])  # a leader may say what it holds before the change counts as made
    assert ledger.deployment(0.0).instances[0].running == 3
    ledger.held_by(0, ["d"])
    assert {placed.leader for placed in ledger.requests.values()} == {0}
    ledger.apply(Change(Instance(4, 0), 2))
    ledger.held_by(2, ["b", "d", "ended before"])
    assert {rid: placed.leader for rid, placed in ledger.requests.items()} == {"a": 0, "b": 2, "c": 0, "d": 2}
    assert [(each["first"], each["requests"], each["tokens"]) for each in ledger.report()] == [(0, 2, 20), (2, 2, 20)]


def test_what_requests_need_is_counted_as_they_come_and_end(ledger):
    """The sums that the ledger keeps are those of the live requests, after each of many steps."""
    rng = random.Random(3)
    merge, split = Change(Instance(2, 0), 2), Change(Instance(2, 0), 1)
    for number in range(400):
        place(ledger, f"r{number}", rng.choice([5, 9, 20, 90]))
        ledger.end([f"r{rng.randrange(number + 1)}", f"r{rng.randrange(number + 1)}"])
        if number % 20 == 0:
            ledger.apply(split if Instance(2, 0) in ledger.layout else merge)
            ledger.held_by(0, rng.sample([*ledger.requests], min(2, len(ledger.requests))))
        for instance, state in zip(ledger.layout, ledger.deployment(0.0).instances, strict=True):
            needs = [placed.need for placed in ledger.requests.values() if placed.leader == instance.leader]
            assert (state.running, state.used, state.largest) == (len(needs), sum(needs), max(needs, default=0))


def test_a_request_that_is_placed_again_counts_once(ledger):
    assert place(ledger, "a", 10) == 0
    assert place(ledger, "a", 30) == 1
    assert [each["tokens"] for each in ledger.report()] == [0, 30, 0, 0]
