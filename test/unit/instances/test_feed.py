"""What a policy is told beside the ledger."""

from __future__ import annotations

from typing import Any

import pytest
from sglang_shift.cost.deployment import InstancePolicy
from sglang_shift.instances.feed import PolicyFeed
from sglang_shift.instances.ledger import Ledger
from sglang_shift.instances.levels import Levels


class Recorder(InstancePolicy):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def arrived(self, *values: Any) -> None:
        self.told.append(values)


def test_the_output_is_a_share_of_what_a_request_may_generate():
    feed, policy = PolicyFeed(), Recorder()
    feed.arrived(policy, 1.0, "a", 10, 100, 112)
    assert policy.told == [(1.0, 10, 100, 112)]
    feed.ended(["a", "unknown"], [20, 7])
    feed.arrived(policy, 2.0, "b", 10, 80, 92)
    assert policy.told[-1] == (2.0, 10, 16, 92)
    feed.ended(["b"], [])  # an aborted request tells nothing
    assert feed.share(100) == pytest.approx(0.2)


def test_the_share_follows_the_last_requests():
    feed, policy = PolicyFeed(), Recorder()
    for number in range(1000):
        feed.arrived(policy, 0.0, str(number), 10, 100, 112)
        feed.ended([str(number)], [100 if number < 500 else 10])
    assert 0.1 < feed.share(100) < 0.12


def test_requests_without_a_limit_do_not_hide_what_the_others_generate():
    feed, policy = PolicyFeed(), Recorder()
    for number in range(200):
        for rid, allowed, generated in ((f"free-{number}", 100_000, 200), (f"limited-{number}", 500, 500)):
            feed.arrived(policy, 0.0, rid, 10, allowed, 12)
            feed.ended([rid], [generated])
    assert [output for _, _, output, _ in policy.told[-2:]] == [200, 500]


def test_the_requests_that_came_last_wait():
    ledger = Ledger.at(Levels((1, 2)))
    ledger.capacities = {1: 100, 2: 200}
    for rid, index, need in (("a", 0, 1), ("b", 0, 2), ("c", 1, 30), ("d", 0, 4)):
        ledger.place(rid, ledger.layout[index], need)
    feed = PolicyFeed()
    assert feed.view(ledger, ledger.deployment(0.0)) == ledger.deployment(0.0)
    feed.waiting = {0: 2, 1: 5}
    first, second = feed.view(ledger, ledger.deployment(0.0)).instances
    assert (first.running, first.queue, first.used, first.largest) == (1, (4, 2), 1, 4)
    assert (first.waiting, first.queued) == (2, 6)
    assert (second.running, second.queue, second.used) == (0, (30,), 0)
    feed.moved(range(0, 1))
    assert feed.waiting == {1: 5}
