"""What rank 0 reports of steps that the policy did not choose."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang_shift.cost.calibration import Calibration
from sglang_shift.cost.chunk_budget import Decodes
from sglang_shift.cost.model import Measurement
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.builtin import FixedMode
from sglang_shift.policy.selector import DRIFT_STEPS, Drift, ModeSelector
from sglang_shift.runtime.chunk_sizer import Chunk
from sglang_shift.runtime.reporter import StepReporter, finished_requests


class Published:
    replica = 0

    def __init__(self):
        self.events = []

    def send(self, event):
        self.events.append(event)


TIMES = [Measurement(phase, mode, n, n, 0.1) for phase in ("prefill", "decode") for mode in Mode for n in (1, 2)]


def reporter_of(policy):
    selector, published = ModeSelector(policy), Published()
    selector.calibration = Calibration.from_measurements({}, 1.0, TIMES, 0.0)
    return StepReporter(selector, published, dict, SimpleNamespace(bytes_sent=0, calls=0)), selector, published


def test_a_chunk_is_reported_and_the_margin_follows_from_steps_that_use_their_budget(caplog):
    reporter, selector, published = reporter_of(FixedMode(Mode.SP))
    kinds = (  # predicted seconds, budget, measured seconds
        (0.08, 0.1, 0.1),
        (0.01, 0.1, 0.9),  # it is short, so its error does not matter
        (0.20, 0.1, 0.25),
    )
    caplog.set_level(logging.INFO)
    for number in range(3 * DRIFT_STEPS):
        predicted, budget, seconds = kinds[number % 3]
        chunk = Chunk(600, 700, predicted, budget, Decodes(3, 300))
        decision = selector.choose(StepState(1, 1, num_running=3))
        reporter.on_launch(number, decision, SimpleNamespace(seconds=seconds), None, chunk)
        reporter.after_result(SimpleNamespace(forward_iter=number, reqs=[]))
    assert reporter.drift.margin == 0.8
    step = next(event for event in published.events if hasattr(event, "chunk_room"))
    assert (step.chunk_room, step.chunk_budget) == (700, 0.1)
    lines = [r.getMessage() for r in caplog.records if "--shift-tbt-target" in r.getMessage()]
    assert len(lines) == 1, "at most a line a minute"
    assert lines[0].startswith("600 prompt tokens beside 3 decoding requests take 200 ms, more than the 100 ms that")


def test_a_step_that_needs_tp_has_its_reason_and_is_no_drift():
    reporter, selector, published = reporter_of(FixedMode(Mode.SP))
    for number in range(2 * DRIFT_STEPS):
        state = StepState(num_tokens=1, needs_tp="an adapter" if number % 2 else None)
        reporter.on_launch(number, selector.choose(state), SimpleNamespace(seconds=0.1), None)
        reporter.after_result(SimpleNamespace(forward_iter=number, reqs=[]))
    steps = [event for event in published.events if hasattr(event, "reason")]
    expected = [("sp", "", False), ("tp", "an adapter", False)] * 2
    assert [(step.mode, step.reason, step.switched) for step in steps[:4]] == expected
    assert reporter.drift.ratio(Mode.SP) is not None and reporter.drift.ratio(Mode.TP) is None


def test_steps_of_one_rank_are_drift_if_they_were_timed():
    reporter, selector, _ = reporter_of(FixedMode(Mode.SP))
    reporter.timed_reasons |= {"alone"}
    for number in range(DRIFT_STEPS):
        decision = selector.choose(StepState(num_tokens=1, needs_tp="alone"))
        reporter.on_launch(number, decision, SimpleNamespace(seconds=0.2), None)
        reporter.after_result(SimpleNamespace(forward_iter=number, reqs=[]))
    assert reporter.drift.ratio(Mode.TP) == pytest.approx(2) and reporter.drift.drifted


def test_each_level_has_a_drift_of_its_own():
    """A merged instance may be too short-lived to find drift at once. Its ratios stay until it is back."""
    reporter, _, published = reporter_of(FixedMode(Mode.SP))
    first, other = reporter.drift, Drift()
    first.add_chunk(1.0, 2.0)
    for drift in (other, first):
        published.events.clear()
        reporter.on_level(drift)
        assert reporter.drift is drift and len(published.events) == 1
    assert len(first._chunk_ratios) == 1
    reporter.on_calibration()
    assert not first._chunk_ratios


def test_a_step_with_sparse_chunks_is_no_drift():
    """The calibration timed exact chunks. But the bound on the gap between tokens is for sparse ones, too."""
    reporter, selector, published = reporter_of(FixedMode(Mode.SP))
    chunk = Chunk(600, 700, 0.1, 0.1, Decodes(3, 300))
    for number in range(2 * DRIFT_STEPS):
        lap = SimpleNamespace(seconds=0.3 if number % 2 else 0.1)
        reporter.on_launch(number, selector.choose(StepState(1, 1)), lap, None, chunk, sparse=bool(number % 2))
        reporter.after_result(SimpleNamespace(forward_iter=number, reqs=[]))
    assert reporter.drift.ratio(Mode.SP) == pytest.approx(1) and reporter.drift.margin == pytest.approx(1 / 3)
    steps = [event for event in published.events if hasattr(event, "seconds")]
    assert [step.seconds for step in steps[:2]] == [0.1, 0.3], "their times are still reported"


def test_the_times_of_a_request_that_was_retracted_begin_with_its_arrival():
    """SGLang notes another time when such a request comes into the queue again."""
    times = SchedulerReqTimeStats()
    times.set_scheduler_recv_time(1.0)
    times.set_wait_queue_entry_time(1.5)
    times.set_prefill_finished_time(2.0)
    times.set_wait_queue_entry_time(5.0)
    times.completion_time = 7.0
    req = SimpleNamespace(
        finished=lambda: True, time_stats=times, output_ids=[1, 2, 3], origin_input_ids=[1], shift_steps={Mode.TP: 3}
    )
    [finished] = finished_requests([req])
    assert (finished.ttft, finished.tpot, finished.e2e) == (1.0, 2.5, 6.0)


def test_the_first_token_of_a_decode_server_comes_with_the_kv_cache():
    times = SchedulerReqTimeStats()
    times.set_scheduler_recv_time(0.5)
    times.decode_prealloc_queue_entry_time, times.wait_queue_entry_time, times.completion_time = 1.0, 3.0, 7.0
    req = SimpleNamespace(
        finished=lambda: True, time_stats=times, output_ids=[1, 2, 3], origin_input_ids=[1], shift_steps={Mode.TP: 3}
    )
    [finished] = finished_requests([req])
    assert (finished.ttft, finished.tpot, finished.e2e) == (2.0, 2.0, 6.0)
