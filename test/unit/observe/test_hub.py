"""The hub: what it makes of events, good, malformed, missing and out of time."""

from __future__ import annotations

import json
import logging
import threading
import time

import msgspec
import pytest
import zmq
from sglang_shift.modes import Mode
from sglang_shift.observe import events
from sglang_shift.observe.events import Finished, Publisher, StateEvent, StepEvent
from sglang_shift.observe.hub import HISTORY_SECONDS, RECENT_REQUESTS, RECENT_STEPS, RECENT_SWITCHES, Gaps, Hub
from sglang_shift.observe.summaries import percentiles

NOW = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def hub(clock):
    return Hub(clock=clock)


def step(time: float = NOW, number: int = 1, **changes) -> StepEvent:
    values = {"mode": "tp", "phase": "decode", "tokens": 4, "prefill_tokens": 0, "running": 4, "waiting": 2}
    return StepEvent(time=time, step=number, **{**values, "pending_tokens": 0, **changes})


def state(time: float = NOW, **changes) -> StateEvent:
    values = {
        "world_size": 2, "sp_size": 2, "model": "demo", "policy": "tokens", "policy_text": "SP above 256", "drift": {},
        "calibration": None, "calibration_text": "", "weight_bytes": 10, "weight_bytes_beyond_base": 3,
        "steps": {"tp": 5, "sp": 1}, "tokens": {"tp": 20, "sp": 300}, "switches": 2,
    }  # fmt: skip
    return StateEvent(time=time, **{**values, **changes})


def strict(hub: Hub) -> dict:
    """The snapshot, through strict JSON."""
    return json.loads(json.dumps(hub.snapshot(), allow_nan=False))


def test_empty(hub):
    value = strict(hub)
    assert (
        value["schema"] == 2
        and value["modes"] == ["tp", "sp"]
        and value["model"] is None
        and value["replicas"] == []
        and not hub.ready
    )
    assert value["requests"]["count"] == 0 and value["requests"]["ttft"] is None
    assert value["events"] == {"received": 0, "dropped": 0, "malformed": 0, "age": None}
    assert len(value["history"]["running"]) == len(value["history"]["steps"]["sp"]) == HISTORY_SECONDS


def test_history_by_second_and_mode(hub, clock):
    hub.take(step(NOW, 1, seconds=0.01))
    hub.take(step(NOW + 0.5, 2, mode="sp", phase="prefill", tokens=300, prefill_tokens=300, waiting=9, seconds=0.2))
    hub.take(step(NOW + 0.9, 3, waiting=1, running=7, seconds=None))
    hub.take(step(NOW + 1, 4))
    clock.now += 3
    history = strict(hub)["history"]
    assert history["start"] == NOW + 3 - HISTORY_SECONDS
    assert history["steps"] == {"tp": [0] * 597 + [2, 1, 0], "sp": [0] * 597 + [1, 0, 0]}
    assert history["tokens"]["sp"][-3:] == history["prefill_tokens"]["sp"][-3:] == [300, 0, 0]
    assert history["busy_seconds"]["tp"][-3:] == [0.01, 0, 0] and history["busy_seconds"]["sp"][-3] == 0.2
    assert history["waiting"][-3:] == [1, 2, None] and history["max_waiting"][-3:] == [9, 2, None]
    assert history["running"][-3] == 7
    minute = strict(hub)["minute"]
    assert minute["steps"] == {"tp": 3, "sp": 1} and minute["tokens"] == {"tp": 12, "sp": 300}


def test_the_second_that_has_not_ended_is_not_in_the_history(hub):
    hub.take(step())
    assert sum(strict(hub)["history"]["steps"]["tp"]) == 0


def test_state_and_totals_of_two_replicas(clock):
    hub = Hub(replicas=2, clock=clock)
    hub.take(state(replica=1, model="second", running=3))
    hub.take(state(replica=0, running=1, waiting=5, drift={"tp": 1.1, "sp": None}))
    clock.now += 2
    value = strict(hub)
    assert value["model"] == "demo" and value["totals"] == {
        "steps": {"tp": 10, "sp": 2},
        "tokens": {"tp": 40, "sp": 600},
        "switches": 4,
    }
    assert [r["replica"] for r in value["replicas"]] == [0, 1] and value["replicas"][0]["age"] == 2
    assert value["replicas"][0]["drift"] == {"tp": 1.1, "sp": None}
    assert value["queue"] == {"running": 4, "waiting": 5, "pending_tokens": 0}


def test_an_idle_state_empties_the_queue(hub):
    hub.take(step(pending_tokens=500))
    assert strict(hub)["queue"]["pending_tokens"] == 500
    hub.take(state())
    assert strict(hub)["queue"] == {"running": 0, "waiting": 0, "pending_tokens": 0}


def test_requests(hub):
    done = [
        Finished(10, 5, ttft=i / 100, tpot=None if i % 2 else 0.01, e2e=1.0, steps={Mode.TP: 4, Mode.SP: 1})
        for i in range(101)
    ]
    hub.take(step(finished=done))
    requests = strict(hub)["requests"]
    assert requests["count"] == 101 and requests["ttft"] == pytest.approx({"p50": 0.5, "p90": 0.9, "p99": 0.99})
    assert requests["tpot"]["p99"] == 0.01 and requests["steps"] == {"tp": 404, "sp": 101}


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles([3.0]) == {"p50": 3, "p90": 3, "p99": 3}
    assert percentiles([2.0, 1.0]) == pytest.approx({"p50": 1.5, "p90": 1.9, "p99": 1.99})


def test_step_times_and_predictions(hub):
    hub.take(step(number=1, seconds=0.02, predicted={Mode.TP: 0.01, Mode.SP: 0.5}))
    hub.take(step(number=2, seconds=0.01, predicted={Mode.TP: 0.01, Mode.SP: 0.5}))
    hub.take(step(number=3, seconds=0.5, phase="mixed"))
    hub.take(step(number=4, seconds=None, mode="sp"))
    decode, mixed = strict(hub)["step_times"]
    assert (decode["mode"], decode["phase"], decode["count"]) == ("tp", "decode", 2)
    assert decode["actual_over_predicted"] == pytest.approx(1.5) and decode["p50"] == pytest.approx(0.015)
    assert mixed["actual_over_predicted"] is None
    steps = strict(hub)["steps"]
    assert steps["seconds"] == [0.02, 0.01, 0.5, None] and steps["mode"] == ["tp", "tp", "tp", "sp"]


def test_switches_newest_first(hub):
    for i in range(60):
        hub.take(step(number=i + 1, mode="sp" if i % 2 else "tp", switched=True, reason=f"reason {i} " + "x" * 10_000))
    switches = strict(hub)["switches"]
    assert len(switches) == RECENT_SWITCHES and switches[0]["reason"].startswith("reason 59")
    assert switches[0]["step"] == 60 and switches[0]["mode"] == "sp" and len(switches[0]["reason"]) == 500


def test_dropped_events(clock):
    hub = Hub(replicas=2, clock=clock)
    for replica, numbers in ((0, [7, 8, 11, 12]), (1, [1, 2, 5, 1, 2])):
        for number in numbers:
            hub.take(step(number=number, replica=replica))
    assert strict(hub)["events"]["dropped"] == 2 + 2
    gaps = Gaps()
    assert [gaps.count_missing(step(number=n)) for n in (5, 6, 9, 1, 1, 3)] == [0, 0, 2, 0, 0, 1]


@pytest.mark.parametrize("leap", [-1e9, -60, 60, 1e9, 1e300, -1e300, float("nan"), float("inf")])
def test_clock_jumps(hub, clock, leap):
    """Events whose time is far off count when they arrive; memory stays bounded."""
    for i in range(50):
        hub.take(step(NOW + (leap if i % 2 else 0), i + 1, switched=True))
        hub.take(state(NOW + leap))
    clock.now += 1
    value = strict(hub)
    assert value["history"]["steps"]["tp"][-1] == 50 and len(hub._seconds) == 1
    assert all(s["time"] == NOW for s in value["switches"])


def test_memory_is_bounded(hub, clock):
    request = Finished(1, 1, 0.1, None, 0.1, {Mode.TP: 1})
    for i in range(5000):
        clock.now += 1
        hub.take(step(clock.now, i + 1, finished=[request]))
    assert len(hub._seconds) <= HISTORY_SECONDS + 11
    assert len(hub._steps) == RECENT_STEPS and len(hub._requests) == RECENT_REQUESTS
    assert sum(strict(hub)["history"]["steps"]["tp"]) == HISTORY_SECONDS


@pytest.mark.parametrize(
    "event",
    [
        step(mode="pp"), step(phase="x"), step(tokens=-1), step(replica=1), step(replica=-1), step(exchanged_bytes=-5),
        state(replica=7), state(switches=-1), state(steps={"tp": -1}), step(number=-4),
    ],
)  # fmt: skip
def test_senseless_events_are_counted(hub, event):
    heard = []
    hub.listeners.append(heard.append)
    hub.take(event)
    assert strict(hub)["events"] == {"received": 0, "dropped": 0, "malformed": 1, "age": None} and heard == []


def test_numbers_that_json_lacks(hub):
    nan, inf = float("nan"), float("inf")
    hub.take(step(seconds=nan, predicted={Mode.TP: inf, Mode.SP: -1.0}, finished=[Finished(1, 1, nan, inf, 2.0, {})]))
    hub.take(state(drift={"tp": nan, "else": 1.0}, calibration={"curves": {"a": [1.0, inf]}, "b": nan}))
    value = strict(hub)
    assert value["calibration"] == {"curves": {"a": [1.0, None]}, "b": None}
    assert value["replicas"][0]["drift"] == {"tp": None, "sp": None}
    assert value["steps"]["seconds"] == value["steps"]["predicted"] == [None] and value["requests"]["ttft"] is None
    assert value["requests"]["e2e"]["p50"] == 2


def test_a_listener_that_fails_harms_nobody(hub, caplog):
    def fail(event):
        raise ValueError("no")

    heard = []
    hub.listeners += [fail, heard.append]
    with caplog.at_level(logging.ERROR):
        hub.take(step(number=1))
        hub.take(step(number=2))
    assert len(heard) == 2 and len(caplog.records) == 1


def test_snapshots_while_events_arrive(hub):
    stop = threading.Event()

    def feed():
        i = 0
        while not stop.is_set() and i < 20_000:
            i += 1
            hub.take(step(number=i, switched=True, finished=[Finished(1, 1, 0.1, 0.1, 0.1, {Mode.TP: 1, Mode.SP: 1})]))

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        for _ in range(20):
            strict(hub)
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    endpoint = f"ipc://{tmp_path}/events"
    monkeypatch.setenv(events.ENDPOINT_VARIABLE, endpoint)
    return endpoint


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def send_until_heard(send, hub: Hub) -> None:
    """A subscriber connects in its own time and misses what was sent before."""

    def heard() -> bool:
        send()
        return hub.ready

    wait_for(heard)


def test_events_of_two_publishers_arrive(endpoint):
    hub = Hub(replicas=2)
    hub.start()
    publishers = [Publisher(0), Publisher(1)]
    try:
        for i, publisher in enumerate(publishers):
            wait_for(lambda p=publisher, i=i: p.send(state(time.time(), replica=i)) or i in hub._states)
            publisher.send(step(time.time(), replica=i, tokens=7, mode="sp"))
        wait_for(lambda: len(hub.snapshot()["steps"]["tokens"]) == 2)
        assert [r["replica"] for r in strict(hub)["replicas"]] == [0, 1]
    finally:
        hub.stop()
        for publisher in publishers:
            publisher._socket.close()


def test_malformed_messages_are_survived(endpoint):
    hub = Hub()
    hub.start()
    socket = zmq.Context.instance().socket(zmq.PUB)
    socket.linger = 0
    socket.bind(endpoint)
    encode = msgspec.msgpack.encode
    good = [b"state", encode(state(time.time()))]
    bad = [
        [b"step"], [b"step", b""], [b"step", b"\xc1"], [b"step", encode({"time": 1})], [b"step", encode([1, 2])],
        [b"other", encode({})], [b"", b"", b""], [b"state", encode({**msgspec.to_builtins(state()), "drift": "x"})],
        [b"step", encode({**msgspec.to_builtins(step()), "tokens": 1.5})], [b"state", b"\x91" * 100_000],
        [b"step", encode({**msgspec.to_builtins(step()), "mode": "dp"})],
        [b"state", encode({**msgspec.to_builtins(state()), "steps": {"dp": 1}})],
    ]  # fmt: skip
    try:
        send_until_heard(lambda: socket.send_multipart(good), hub)
        for message in bad:
            socket.send_multipart(message)
        wait_for(lambda: hub.snapshot()["events"]["malformed"] == len(bad))
        received = hub.snapshot()["events"]["received"]
        socket.send_multipart([b"step", encode(step(time.time()))])
        wait_for(lambda: hub.snapshot()["events"]["received"] > received)
    finally:
        hub.stop()
        socket.close()


def test_without_an_endpoint_the_hub_waits_and_stops(monkeypatch):
    monkeypatch.delenv(events.ENDPOINT_VARIABLE, raising=False)
    hub = Hub()
    hub.start()
    hub.stop()
    assert not hub.ready


class TestBound:
    def test_without_a_bound(self, hub):
        hub.take(state())
        hub.take(step())
        assert strict(hub)["tbt"] is None

    def test_the_bound_and_the_steps_under_it(self, hub):
        hub.take(state(tbt_target=0.1, tbt_margin=0.8))
        assert strict(hub)["tbt"] == {
            "target": 0.1,
            "margin": 0.8,
            "chunks": {"count": 0, "tokens": None, "room": None, "budget": None, "over_budget": None},
        }
        hub.take(step(number=1))
        for number, (tokens, seconds) in enumerate(((600, 0.05), (700, 0.09), (50, None)), 2):
            changes = {"prefill_tokens": tokens, "chunk_room": 700, "chunk_budget": 0.08, "seconds": seconds}
            hub.take(step(number=number, phase="mixed", **changes))
        chunks = strict(hub)["tbt"]["chunks"]
        assert chunks["count"] == 3
        assert (chunks["tokens"]["p50"], chunks["room"]["p50"]) == (600, 700)
        assert chunks["budget"]["p90"] == pytest.approx(0.08)
        assert chunks["over_budget"] == 0.5

    def test_values_that_make_no_sense(self, hub):
        hub.take(state(tbt_target=float("nan"), tbt_margin=float("inf")))
        assert strict(hub)["tbt"] is None
        hub.take(state(tbt_target=0.1, tbt_margin=float("nan")))
        for number, (room, budget) in enumerate(((-1, 0.1), (10, float("nan")), (10, -0.5)), 1):
            hub.take(step(number=number, chunk_room=room, chunk_budget=budget, seconds=0.1))
        tbt = strict(hub)["tbt"]
        assert tbt["margin"] == 1.0
        assert tbt["chunks"]["count"] == 1, (
            "the decodes alone may take longer than the target, so a budget may be below 0"
        )
        assert tbt["chunks"]["over_budget"] == 1.0


class TestGaps:
    """The gaps between tokens of the last minutes."""

    def test_without_gaps(self, hub):
        hub.take(step())
        assert strict(hub)["gaps"] == {"1": None, "5": None, "10": None}

    def test_by_minutes_and_under_the_target_of_their_time(self, hub, clock):
        hub.take(step(number=1, gaps=[(0.01, 3)]))
        clock.now += 120
        hub.take(state(clock.now, tbt_target=0.1))
        hub.take(step(clock.now, 2, gaps=[(0.05, 2), (0.15, 1)]))
        gaps = strict(hub)["gaps"]
        assert (gaps["1"]["count"], gaps["5"]["count"], gaps["10"]["count"]) == (3, 6, 6)
        assert gaps["1"]["max"] == gaps["10"]["max"] == 0.15
        assert gaps["1"]["late"] == gaps["10"]["late"] == pytest.approx(1 / 3)
        assert sum(gaps["10"]["counts"]) == 6
        clock.now += 400
        assert strict(hub)["gaps"]["5"] is None and strict(hub)["gaps"]["10"]["count"] == 6

    def test_values_that_make_no_sense(self, hub):
        hub.take(step(gaps=[(float("nan"), 1), (-1.0, 1), (0.5, 0), (float("inf"), 2), (0.25, 1)]))
        assert strict(hub)["gaps"]["1"]["count"] == 1 and strict(hub)["gaps"]["1"]["max"] == 0.25
