"""What a merge makes of the queues and the counters of its parts, without ranks."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift.instances.messages import ChangeLevelReq
from sglang_shift.instances.prefix_tree import CachedPage, PrefixTree
from sglang_shift.runtime import level_change as module
from sglang_shift.runtime.level_change import GivenUp, LevelChange, Part
from sglang_shift.runtime.quiesce import Retracted
from sglang_shift.runtime.request_record import keep_request, record, restore

REQUEST = ChangeLevelReq(1, 0, 2, 2, "")


def waiting(rid: str, arrival: int) -> Req:
    """A request that came when its instance had processed ``arrival`` tokens."""
    req = Req(rid, "", array("q", range(100)), SamplingParams(max_new_tokens=9))
    req.arrival_processed_tokens = arrival
    keep_request(req, SimpleNamespace(rid=rid, sampling_params=None, time_stats=None))
    return req


def made_again(each) -> Req:
    req = waiting(each.rid, 0)
    restore(req, each)
    return req


def part(reqs: list[Req], processed: int) -> Part:
    counters = {"forward_ct": 0, "processed_tokens_counter": processed, "new_token_ratio": 0.5}
    records = [record(req, running=False, computed=0) for req in reqs]
    return Part(1, records, PrefixTree([]), counters, None, [])


@pytest.mark.parametrize("mine", [0, 1], ids=["the rank of the first part", "the rank of the second part"])
def test_a_merge_keeps_for_how_many_tokens_requests_have_waited(monkeypatch, mine):
    """One part has processed far more tokens than the other."""
    queues = [[waiting("short", 99_900)], [waiting("long", 100)]]
    parts = [part(queues[0], 100_000), part(queues[1], 1_000)]
    scheduler = SimpleNamespace(
        waiting_queue=queues[mine], make_request=made_again, renew_limits=lambda req: None, device="cpu",
        new_token_ratio_tracker=SimpleNamespace(current=0.0), grammar_manager=SimpleNamespace(clear=lambda: None),
    )  # fmt: skip
    monkeypatch.setattr(module, "set_random_state", lambda *_: None)
    LevelChange(scheduler, REQUEST, [])._adopt(parts)
    counter, queue = scheduler.processed_tokens_counter, scheduler.waiting_queue
    assert {req.rid: counter - req.arrival_processed_tokens for req in queue} == {"short": 100, "long": 900}
    queue.append(waiting("new", counter - 500))
    monkeypatch.setattr(SchedulePolicy, "_uncached_len", lambda req: 100)
    SchedulePolicy._sort_by_hrrn(queue, set(), counter)
    assert [req.rid for req in queue] == ["long", "new", "short"]


@pytest.fixture
def given_up(monkeypatch):
    """A merge of an instance and another one, which is given up. The test says what happens before."""
    pages = [CachedPage(n, n - 1, tuple(range(16 * n - 16, 16 * n)), (None, None)) for n in range(1, 7)]
    place, group = SimpleNamespace(leads=True, rank=0), SimpleNamespace(cpu_group=None)
    switch = SimpleNamespace(level=1, place=place, places={2: SimpleNamespace(group=group)})
    cache = SimpleNamespace(read=lambda: PrefixTree(pages))
    change = LevelChange(SimpleNamespace(running_batch=None, tree_cache=cache, shift_switch=switch), REQUEST, [])

    def merge(level: int) -> None:
        raise GivenUp("there is no memory")

    monkeypatch.setattr(change, "_merge", merge)
    monkeypatch.setattr(LevelChange, "_gather", lambda self, value: [value, 5 * bool(value)])
    return change


def test_a_change_that_is_given_up_early_costs_nothing(given_up):
    told = given_up.run()
    assert (told.ok, told.tokens_recomputed) == (False, 0)


def test_a_change_that_is_given_up_late_says_what_must_be_computed_again(given_up):
    """The batches were emptied, and the prefix cache has kept 96 of the tokens of a request."""
    given_up.retracted = [Retracted(waiting("a", 0), computed=99)]
    assert given_up.run().tokens_recomputed == 3 + 5, "of this instance, and of the other one"
    given_up.scheduler.shift_switch.place.leads = False
    assert given_up.run().tokens_recomputed == 0, "the leader counts for its instance"
