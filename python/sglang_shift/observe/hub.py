"""Sums up the events of the last ten minutes in bounded memory, for the page and the status view."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from sglang_shift.modes import MODES, Mode
from sglang_shift.observe.events import SCHEMA, Event, Finished, InstancesEvent, StateEvent, StepEvent, Subscriber
from sglang_shift.observe.gap_counts import GapCounts
from sglang_shift.observe.summaries import (
    PHASES,
    BoundedStep,
    Step,
    bound,
    columns,
    finite,
    jsonable,
    request_percentiles,
    service,
    step_times,
)

logger = logging.getLogger(__name__)

HISTORY_SECONDS = 600
GAP_MINUTES = (1, 5, 10)
"""The times over which gaps between tokens are summed up: those that the page can show."""
RECENT_STEPS = 2000
RECENT_REQUESTS = 1000
RECENT_SWITCHES = 50
REASON_CHARACTERS = 500

CLOCK_TOLERANCE = 5.0
"""Largest difference in seconds between an event's clock and ours. Beyond it, the time of arrival is used instead."""

Listener = Callable[[Event], None]


class Gaps:
    """Counts the step events that were sent but did not arrive."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def count_missing(self, event: StepEvent) -> int:
        """Return how many events are missing before ``event``; 0 for a replica's first event and after its restart."""
        last = self._last.get(event.replica, event.step)
        self._last[event.replica] = event.step
        return max(0, event.step - last - 1)


@dataclass(slots=True)
class _Second:
    """What happened in one second, summed over all replicas."""

    steps: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    tokens: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    prefill_tokens: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(MODES, 0))
    busy_seconds: dict[Mode, float] = field(default_factory=lambda: dict.fromkeys(MODES, 0.0))
    gaps: GapCounts = field(default_factory=GapCounts)
    running: int | None = None
    waiting: int | None = None
    pending_tokens: int | None = None
    max_running: int | None = None
    max_waiting: int | None = None


class Hub:
    """Takes the events of all replicas, and answers :meth:`snapshot`. Thread-safe.

    Args:
        replicas: Number of replicas. Events of other replicas count as malformed.
        clock: Returns Unix seconds that never go back. The default is the system's clock at the start, and continues
            with a monotonic clock.

    Attributes:
        listeners: Called with every well-formed event, in the hub's thread.
    """

    def __init__(self, replicas: int = 1, clock: Callable[[], float] | None = None) -> None:
        offset = time.time() - time.monotonic()
        self.replicas = replicas
        self.listeners: list[Listener] = []
        self._clock = clock or (lambda: offset + time.monotonic())
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = self._clock()
        self._received = self._dropped = self._malformed = 0
        self._last_event: float | None = None
        self._listener_failed = False
        self._gaps = Gaps()
        self._seconds: dict[int, _Second] = {}
        self._steps: deque[Step] = deque(maxlen=RECENT_STEPS)
        self._bounded: deque[BoundedStep] = deque(maxlen=RECENT_STEPS)
        self._requests: deque[Finished] = deque(maxlen=RECENT_REQUESTS)
        self._switches: deque[dict[str, Any]] = deque(maxlen=RECENT_SWITCHES)
        self._states: dict[int, tuple[float, dict[str, Any]]] = {}
        self._queues: dict[int, tuple[int, int, int]] = {}
        self._instances: dict[str, Any] | None = None

    def start(self) -> None:
        """Subscribe, and take events in a daemon thread until :meth:`stop`."""
        subscriber = Subscriber(self.replicas)
        self._thread = threading.Thread(target=self._run, args=(subscriber,), name="sglang_shift hub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. This returns within about half a second."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether a state event has arrived."""
        return bool(self._states)

    def _run(self, subscriber: Subscriber) -> None:
        while not self._stopped.is_set():
            try:
                event = subscriber.receive()
            except zmq.ZMQError:
                logger.exception("sglang_shift: no more events: the page and the metrics stand still")
                break
            except Exception:  # decoding can raise anything: the sender is at fault, and the next message may be good
                self.count_malformed()
                continue
            if event is not None:
                self.take(event)
        subscriber.close()

    def count_malformed(self) -> None:
        """Count a message that could not be read."""
        with self._lock:
            self._malformed += 1

    def take(self, event: Event) -> None:
        """Take one event."""
        if not self._well_formed(event):
            self.count_malformed()
            return
        with self._lock:
            now = self._clock()
            self._received += 1
            self._last_event = now
            if not abs(event.time - now) <= CLOCK_TOLERANCE:  # also for NaN
                event.time = now
            if isinstance(event, StepEvent):
                self._take_step(event)
            elif isinstance(event, InstancesEvent):
                fields = jsonable(msgspec.to_builtins(event))
                self._instances = {name: fields[name] for name in ("levels", "epoch", "instances", "last", "policy")}
            else:
                self._take_state(event, now)
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                if not self._listener_failed:  # log it once: it may happen at every step
                    logger.exception("sglang_shift: %r cannot take an event; later failures are not logged", listener)
                self._listener_failed = True

    def _well_formed(self, event: Event) -> bool:
        """Return whether the values make sense. Numbers that are not finite become None."""
        if not 0 <= event.replica < self.replicas:
            return False
        if isinstance(event, InstancesEvent):
            return event.epoch >= 0
        if isinstance(event, StateEvent):
            event.tbt_target, event.tbt_margin = finite(event.tbt_target) or 0.0, finite(event.tbt_margin) or 1.0
            event.drift = {mode: finite(event.drift.get(mode)) for mode in MODES}
            counts = [event.weight_bytes, event.weight_bytes_beyond_base, event.switches, event.running, event.waiting]
            return min(*counts, *event.steps.values(), *event.tokens.values()) >= 0
        event.seconds = finite(event.seconds)
        event.chunk_room = finite(event.chunk_room)
        if event.chunk_budget is not None and not math.isfinite(event.chunk_budget):
            event.chunk_budget = None
        event.gaps = [(s, count) for s, count in event.gaps if finite(s) is not None and count > 0]
        event.predicted = {mode: s for mode, s in event.predicted.items() if finite(s) is not None}
        counts = [event.tokens, event.prefill_tokens, event.running, event.waiting, event.pending_tokens, event.step]
        known = event.mode in MODES and event.phase in PHASES
        return known and min(*counts, event.exchanged_bytes, event.exchanges) >= 0

    def _second(self, when: float) -> _Second:
        key = int(when)
        if key not in self._seconds:
            oldest = key - HISTORY_SECONDS - 2 * int(CLOCK_TOLERANCE)
            for old in [k for k in self._seconds if k < oldest]:
                del self._seconds[old]
            self._seconds[key] = _Second()
        return self._seconds[key]

    def _take_step(self, event: StepEvent) -> None:
        second = self._second(event.time)
        second.steps[event.mode] += 1
        second.tokens[event.mode] += event.tokens
        second.prefill_tokens[event.mode] += event.prefill_tokens
        second.busy_seconds[event.mode] += event.seconds or 0.0
        _, state = self._states.get(event.replica, (0.0, {}))
        for seconds, count in event.gaps:
            second.gaps.add(seconds, count, state.get("tbt_target", 0.0))
        self._take_queue(second, event.replica, event.running, event.waiting, event.pending_tokens)
        self._dropped += self._gaps.count_missing(event)
        predicted = event.predicted.get(event.mode)
        self._steps.append(Step(event.time, event.mode, event.phase, event.tokens, event.seconds, predicted))
        if event.chunk_room is not None and event.chunk_budget is not None:
            self._bounded.append(BoundedStep(event.prefill_tokens, event.chunk_room, event.chunk_budget, event.seconds))
        self._requests.extend(event.finished)
        if event.switched:
            switch = {"time": event.time, "replica": event.replica, "step": event.step, "mode": event.mode}
            self._switches.appendleft({**switch, "reason": event.reason[:REASON_CHARACTERS]})

    def _take_state(self, event: StateEvent, now: float) -> None:
        self._states[event.replica] = now, jsonable(msgspec.to_builtins(event))
        _, _, pending = self._queues.get(event.replica, (0, 0, 0))
        idle = event.running == event.waiting == 0
        self._take_queue(self._second(event.time), event.replica, event.running, event.waiting, 0 if idle else pending)

    def _take_queue(self, second: _Second, replica: int, running: int, waiting: int, pending: int) -> None:
        self._queues[replica] = running, waiting, pending
        second.running, second.waiting, second.pending_tokens = (
            sum(n) for n in zip(*self._queues.values(), strict=True)
        )
        second.max_running = max(second.max_running or 0, second.running)
        second.max_waiting = max(second.max_waiting or 0, second.waiting)

    def snapshot(self) -> dict[str, Any]:
        """Return all data as a JSON value, without NaN or infinities. docs/observing.md explains the fields."""
        with self._lock:
            now = self._clock()
            steps, bounded, requests = list(self._steps), list(self._bounded), list(self._requests)
            states = [(now - at, state) for _, (at, state) in sorted(self._states.items())]
            running, waiting, pending = (sum(n) for n in zip((0, 0, 0), *self._queues.values(), strict=True))
            value = {
                "schema": SCHEMA,
                "modes": list(MODES),
                "time": now,
                "started": self._started,
                "events": {
                    "received": self._received,
                    "dropped": self._dropped,
                    "malformed": self._malformed,
                    "age": None if self._last_event is None else now - self._last_event,
                },
                "queue": {"running": running, "waiting": waiting, "pending_tokens": pending},
                "history": self._history(int(now) - HISTORY_SECONDS, int(now)),
                "minute": self._minute(int(now)),
                "gaps": self._gap_summaries(int(now)),
                "switches": [dict(switch) for switch in self._switches],
                "instances": self._instances,
            }
        return (
            value
            | service(states)
            | {"steps": columns(steps), "step_times": step_times(steps)}
            | {"requests": request_percentiles(requests), "tbt": bound(states, bounded)}
        )

    def _history(self, start: int, end: int) -> dict[str, Any]:
        """Return one list for each quantity, with one entry for each complete second."""
        empty = _Second()
        seconds = [self._seconds.get(key, empty) for key in range(start, end)]
        value: dict[str, Any] = {"start": start}
        for name in ("steps", "tokens", "prefill_tokens"):
            value[name] = {mode: [getattr(s, name)[mode] for s in seconds] for mode in MODES}
        value["busy_seconds"] = {mode: [round(s.busy_seconds[mode], 6) for s in seconds] for mode in MODES}
        for name in ("running", "waiting", "pending_tokens", "max_running", "max_waiting"):
            value[name] = [getattr(s, name) for s in seconds]
        return value

    def _minute(self, end: int) -> dict[str, dict[Mode, float]]:
        seconds = [s for key, s in self._seconds.items() if end - 60 <= key < end]
        return {
            name: {mode: sum(getattr(s, name)[mode] for s in seconds) for mode in MODES}
            for name in ("steps", "tokens", "prefill_tokens", "busy_seconds")
        }

    def _gap_summaries(self, end: int) -> dict[str, Any]:
        """Return the gaps between tokens by the number of minutes, with those of the second that has not ended."""
        summaries = {}
        for minutes in GAP_MINUTES:
            gaps = GapCounts()
            for key, second in self._seconds.items():
                if key > end - 60 * minutes:
                    gaps.include(second.gaps)
            summaries[str(minutes)] = gaps.summary()
        return summaries
