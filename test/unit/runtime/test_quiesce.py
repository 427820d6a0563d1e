"""How requests go back to the queue, without ranks."""

from __future__ import annotations

import time
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang_shift.runtime.instance_queue import RunningFirstPolicy
from sglang_shift.runtime.instance_scheduler import InstanceScheduler
from sglang_shift.runtime.quiesce import retract
from sglang_shift.runtime.request_record import keep_request, record, restore, restore_times

HOUR = 3600


def received(rid: str, seconds_ago: float) -> Req:
    req = Req(rid, "", array("q", [1, 2]), SamplingParams(max_new_tokens=9))
    begin = time.perf_counter() - seconds_ago
    req.time_stats.set_scheduler_recv_time(begin)
    req.time_stats.set_wait_queue_entry_time(begin)
    keep_request(req, SimpleNamespace(rid=rid, sampling_params=None, time_stats=None))
    return req


@pytest.fixture
def emptied():
    """A scheduler after a change: one request ran for an hour, and two wait, one of them for two hours."""
    running, old, new = received("running", HOUR), received("old", 2 * HOUR), received("new", 1)
    scheduler = SimpleNamespace(
        running_batch=ScheduleBatch(reqs=[running], batch_is_full=False), last_batch=None, chunked_req=None,
        waiting_queue=[old, new], req_to_token_pool=SimpleNamespace(clear=lambda: None),
    )  # fmt: skip
    retract(scheduler)
    return scheduler


def test_a_request_that_ran_for_long_has_not_waited(emptied):
    assert [req.rid for req in emptied.waiting_queue] == ["running", "old", "new"]
    with envs.SGLANG_REQ_WAITING_TIMEOUT.override(60), envs.SGLANG_REQ_RUNNING_TIMEOUT.override(-1):
        assert [abort.rid for abort in Scheduler._poll_timeout_aborts(emptied)] == ["old"]
        for req in emptied.waiting_queue:  # as another rank makes it again
            again = received(req.rid, 0)
            restore_times(again, record(req, running=False, computed=0))
            assert again.time_stats.wait_queue_entry_time == req.time_stats.wait_queue_entry_time
            assert again.time_stats.scheduler_recv_time == req.time_stats.scheduler_recv_time


def test_a_second_change_keeps_the_order_of_arrival(emptied):
    """Between two changes there may be no step, so the request still waits that ran before the first one."""
    records = [record(req, running=False, computed=0) for req in emptied.waiting_queue]
    assert [each.rid for each in sorted(records, key=lambda each: each.arrival)] == ["old", "running", "new"]


def test_with_priorities_a_request_that_ran_goes_first_among_its_equals(emptied):
    cache = SimpleNamespace(supports_fast_match_prefix=lambda: False)
    policy = RunningFirstPolicy("fcfs", cache, False, True, False)
    queue = [*reversed(emptied.waiting_queue), received("urgent", 0)]
    for req in queue:
        req.priority = int(req.rid == "urgent")
    with envs.SGLANG_ENABLE_WAITING_PREFIX_REFRESH.override(False):
        policy.calc_priority(queue)
        assert [req.rid for req in queue] == ["urgent", "running", "old", "new"]
        again = [received(req.rid, 0) for req in queue]  # as another rank makes them again
        for req, each in zip(queue, again, strict=True):
            travels = record(req, running=False, computed=0)
            restore(each, travels)
            restore_times(each, travels)
        policy.calc_priority(again)
        assert [req.rid for req in again] == ["urgent", "running", "old", "new"]


def test_a_request_that_sglang_retracts_later_goes_last(emptied, monkeypatch):
    monkeypatch.setattr(Scheduler, "_add_request_to_queue", lambda *_: None)
    running = emptied.waiting_queue[0]
    assert running.shift_goes_first
    InstanceScheduler._add_request_to_queue(InstanceScheduler.__new__(InstanceScheduler), running, is_retracted=True)
    assert not running.shift_goes_first
