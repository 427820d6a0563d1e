"""Reads a server's state while a workload runs: its Prometheus metrics, and our counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from sglang_shift.modes import MODES
from sglang_shift.tools.benchmark.records import InstanceChange, Sample
from sglang_shift.tools.servers import call

# The first metric that a server has counts. Our metrics change at every step, SGLang's at every batch that it logs.
RUNNING = ("sglang_shift:queue_requests{running}", "sglang:num_running_reqs", "vllm:num_requests_running")
WAITING = ("sglang_shift:queue_requests{waiting}", "sglang:num_queue_reqs", "vllm:num_requests_waiting")
KV_USAGE = ("sglang:token_usage", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
STEPS = "sglang_shift:steps_total{%s}"
COUNTERS = ("switches", "exchanged_bytes", "exchanges")


def read_metrics(text: str) -> dict[str, list[float]]:
    """Return the values of every metric in Prometheus' text format, one value for each set of labels.

    A label called ``mode`` or ``state`` goes into the name: ``sglang_shift:steps_total{tp}``.
    """
    from prometheus_client.parser import text_string_to_metric_families

    metrics: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = sample.labels.get("state") or sample.labels.get("mode")
            metrics.setdefault(sample.name + (f"{{{label}}}" if label else ""), []).append(sample.value)
    return metrics


def counters(url: str) -> dict[str, int] | None:
    """Return our counters so far, summed over replicas, or None for another server.

    Of a server with instances only the first one answers, so its counters would not be those of the server.
    """
    try:
        states = [s["shift"] for s in call(url + "/server_info")["internal_states"]]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if any("instances" in state for state in states):
        return None
    total = {f"{mode}_steps": sum(s["steps"][mode] for s in states) for mode in MODES}
    return total | {name: sum(s[name] for s in states) for name in COUNTERS}


class InstanceWatch:
    """Reads which instances a server has, and how they change.

    Args:
        url: The server's address. A server without instances is asked only once.

    Attributes:
        changes: The merges and splits since this object was made, in their order.
    """

    def __init__(self, url: str) -> None:
        self.changes: list[InstanceChange] = []
        self._url = url
        report = self._read()
        self._has_instances = report is not None
        self._seen = _last_epoch(report["last"]) if report else 0

    def levels(self) -> dict[int, int]:
        """Return the number of ranks at each level now, and note the changes since the last call."""
        report = self._read() if self._has_instances else None
        if report is None:
            return {}
        changes = [each for each in report["last"] if each["epoch"] > self._seen]
        self.changes += msgspec.convert(changes, list[InstanceChange])
        self._seen = max(self._seen, _last_epoch(changes))
        ranks: dict[int, int] = {}
        for instance in report["instances"]:
            ranks[instance["level"]] = ranks.get(instance["level"], 0) + instance["level"]
        return ranks

    def _read(self) -> Any:
        try:
            return call(self._url + "/shift/instances")
        except (OSError, ValueError):
            return None


def _last_epoch(changes: list[dict[str, Any]]) -> int:
    """Return the number of the last change of a report. The report has no change that is still being made."""
    return max((each["epoch"] for each in changes), default=0)


class Watch:
    """Samples a server's metrics from a thread, while a ``with`` block runs.

    Args:
        url: The server's address. A server without ``/metrics`` gives no samples.
        interval: Seconds between samples.

    Attributes:
        samples: The samples in the order of their times.
        instances: What is known of the server's instances.
    """

    def __init__(self, url: str, interval: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self.instances = InstanceWatch(url)
        self._url, self._interval = url, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._started, self._first = time.perf_counter(), self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.instances.levels()

    def _watch(self) -> None:
        while self._first is not None and not self._stop.wait(self._interval):
            if (metrics := self._read()) is not None:
                self.samples.append(self._sample(metrics, time.perf_counter() - self._started))

    def _read(self) -> dict[str, list[float]] | None:
        try:
            return read_metrics(call(self._url + "/metrics", text=True))
        except (OSError, ValueError):
            return None

    def _sample(self, metrics: dict[str, list[float]], at: float) -> Sample:
        def pick(names: tuple[str, ...], combine: Callable[[list[float]], float]) -> float | None:
            return next((combine(metrics[name]) for name in names if name in metrics), None)

        before = self._first or {}
        names = {mode: STEPS % mode for mode in MODES}
        steps = {m: int(sum(metrics[n]) - sum(before.get(n, []))) for m, n in names.items() if n in metrics}
        levels = self.instances.levels()
        return Sample(round(at, 3), pick(RUNNING, sum), pick(WAITING, sum), pick(KV_USAGE, max), steps, levels)


def change(before: dict[str, int] | None, after: dict[str, int] | None) -> dict[str, Any] | None:
    """Return how much the counters went up, or None for another server."""
    return None if before is None or after is None else {name: after[name] - before[name] for name in after}
