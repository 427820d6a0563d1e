"""Adds Prometheus metrics of the steps to SGLang's metrics, if ``--enable-metrics`` asks for them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

from sglang_shift.modes import MODES
from sglang_shift.observe.events import Event, InstancesEvent, StateEvent, StepEvent
from sglang_shift.observe.hub import Gaps
from sglang_shift.observe.summaries import PHASES

PREFIX = "sglang_shift:"

STEP_TIME_BUCKETS = tuple(
    ms / 1e3
    for ms in (
        0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75,
        100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000,
    )
)  # fmt: skip
"""Upper bounds of the buckets, in seconds."""
GAP_BUCKETS = (*STEP_TIME_BUCKETS[2:], 20.0, 30.0, 60.0)
"""Upper bounds of the buckets, in seconds."""
CHUNK_BUCKETS = tuple(2**i for i in range(6, 18))
"""Upper bounds of the buckets, in prompt tokens."""
MASS_BUCKETS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Upper bounds of the buckets, as shares of the softmax."""
SHARE_BUCKETS = tuple(i / 20 for i in range(1, 21))
"""Upper bounds of the buckets, as shares of all pairs of a query and a key."""


class Metric(NamedTuple):
    """One metric.

    Attributes:
        kind: ``counter``, ``gauge`` or ``histogram``.
        help: Text that Prometheus shows for it.
        labels: Names of its labels, without SGLang's labels and ``replica``.
        buckets: Upper bounds of the buckets of a histogram.
    """

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = STEP_TIME_BUCKETS


METRICS = {
    "steps_total": Metric("counter", "Steps run.", ("mode", "phase")),
    "tokens_total": Metric("counter", "Tokens computed.", ("mode", "phase")),
    "eager_steps_total": Metric(
        "counter", "Steps that no captured CUDA graph served, where some are captured for the phase.", ("mode", "phase")
    ),
    "switches_total": Metric("counter", "Changes of mode; the label is the new one.", ("mode",)),
    "queue_requests": Metric("gauge", "Requests, running or waiting.", ("state",)),
    "pending_prefill_tokens": Metric("gauge", "Prompt tokens that wait for a later step."),
    "exchanged_bytes_total": Metric("counter", "Bytes that the first rank sent in exchanges around attention."),
    "exchanges_total": Metric("counter", "Exchanges around attention."),
    "step_time_seconds": Metric("histogram", "Time of a step.", ("mode", "phase")),
    "predicted_step_time_seconds_total": Metric(
        "counter", "Predicted time of the steps that have both a prediction and a measurement.", ("mode", "phase")
    ),
    "measured_step_time_seconds_total": Metric(
        "counter", "Measured time of the steps that have both a prediction and a measurement.", ("mode", "phase")
    ),
    "step_time_ratio": Metric("gauge", "Median of actual over predicted step time of late.", ("mode",)),
    "token_gap_seconds": Metric("histogram", "Gaps between two tokens of a request.", buckets=GAP_BUCKETS),
    "tbt_target_seconds": Metric("gauge", "Bound on the gap between two tokens of a request; 0 for none."),
    "tbt_margin": Metric("gauge", "Share of that bound that predicted step times may use."),
    "chunk_tokens": Metric("histogram", "Prompt tokens of steps under that bound.", buckets=CHUNK_BUCKETS),
    "chunk_room_tokens": Metric("histogram", "Prompt tokens that these steps could take.", buckets=CHUNK_BUCKETS),
    "chunk_budget_seconds": Metric("histogram", "Time that the prompts of these steps could take."),
    "sparse_tokens_total": Metric("counter", "Prompt tokens of finished requests that were computed sparsely."),
    "sparse_dropped_mass": Metric(
        "histogram", "Largest softmax mass that a query of such a request left out.", buckets=MASS_BUCKETS
    ),
    "sparse_computed_share": Metric(
        "histogram",
        "Share of the pairs of a query and a key of such a request that were computed.",
        buckets=SHARE_BUCKETS,
    ),
    "weight_bytes": Metric("gauge", "Bytes of weights on the first rank.", ("kind",)),
    "instances": Metric("gauge", "Instances; the label is the number of their ranks.", ("level",)),
    "instance_changes_total": Metric(
        "counter", "Merges and splits of instances, by the level that was asked for.", ("level", "result")
    ),
    "instance_change_seconds_total": Metric("counter", "Time that merges and splits took, by phase.", ("phase",)),
    "instance_change_bytes_total": Metric("counter", "Bytes of KV cache that merges and splits sent."),
    "instance_recomputed_tokens_total": Metric("counter", "Tokens that were computed again after merges and splits."),
    "instance_predicted_seconds": Metric(
        "gauge", "Mean time of a request that --instance-policy auto predicts for a layout.", ("layout",)
    ),
    "instance_predicted_loss": Metric(
        "gauge", "Share of the demand that it predicts a layout not to serve without long queues.", ("layout",)
    ),
    "events_dropped_total": Metric("counter", "Step events that did not arrive: the other metrics lack these steps."),
}
"""The metrics by name. The names do not include :data:`PREFIX`."""
LABELS = frozenset(("replica", "le", *(label for metric in METRICS.values() for label in metric.labels)))
"""Labels that a user cannot give to the metrics, because they have them. Prometheus adds ``le`` to histograms."""

NOT_PREDICTED = {"seconds": math.nan, "loss": math.nan}
"""The values of a layout of which there is no prediction any more."""


class Metrics:
    """Updates the metrics, as a listener of the hub.

    Only one process may have this listener. In several processes the counters would be multiplied.

    Args:
        labels: Labels of every metric, such as SGLang's ``model_name``.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels = {name: str(value) for name, value in labels.items()}
        self._metrics: dict[str, Any] = {}
        self._gaps = Gaps()
        self._cumulative: dict[tuple[str, int], int] = {}
        self._replicas: set[int] = set()
        self._predicted: set[str] = set()  # the layouts that have had a prediction
        self._epoch = 0  # of the last change of instances that was counted

    def __call__(self, event: Event) -> None:
        """Update the metrics with one event."""
        if not self._metrics:
            self._create()
        if isinstance(event, InstancesEvent):
            self._take_instances(event)
            return
        if event.replica not in self._replicas:
            self._begin(event.replica)
        if isinstance(event, StepEvent):
            self._take_step(event)
        else:
            self._take_state(event)

    def _create(self) -> None:
        # Not earlier: prometheus_client must be imported after SGLang has set PROMETHEUS_MULTIPROC_DIR. SGLang sets it
        # before it starts the processes that send events.
        from prometheus_client import Counter, Gauge, Histogram

        for name, metric in METRICS.items():
            labels = (*self.labels, "replica", *metric.labels)
            if metric.kind == "counter":
                made: Any = Counter(PREFIX + name, metric.help, labels)
            elif metric.kind == "gauge":
                made = Gauge(PREFIX + name, metric.help, labels, multiprocess_mode="mostrecent")
            else:
                made = Histogram(PREFIX + name, metric.help, labels, buckets=metric.buckets)
            self._metrics[name] = made

    def _begin(self, replica: int) -> None:
        """Start the counters at 0. A rate needs two values, and a share needs every mode."""
        self._replicas.add(replica)
        self._metric("events_dropped_total", replica)
        for mode in MODES:
            self._metric("switches_total", replica, mode=mode)
            for phase in PHASES:
                self._metric("steps_total", replica, mode=mode, phase=phase)
                self._metric("tokens_total", replica, mode=mode, phase=phase)
                self._metric("eager_steps_total", replica, mode=mode, phase=phase)

    def _metric(self, name: str, replica: int, **labels: str) -> Any:
        return self._metrics[name].labels(**self.labels, replica=str(replica), **labels)

    def _increase(self, name: str, replica: int, cumulative: int) -> None:
        """Raise a counter by the growth of ``cumulative``, which the rank counts from its start.

        So the counter is right even if events were missed. ``cumulative`` may restart.
        """
        last = self._cumulative.get((name, replica), 0)
        self._cumulative[name, replica] = cumulative
        self._metric(name, replica).inc(cumulative - last if cumulative >= last else cumulative)

    def _take_step(self, event: StepEvent) -> None:
        replica, labels = event.replica, {"mode": event.mode, "phase": event.phase}
        self._metric("steps_total", replica, **labels).inc()
        self._metric("tokens_total", replica, **labels).inc(event.tokens)
        if event.replayed is False:
            self._metric("eager_steps_total", replica, **labels).inc()
        if event.switched:
            self._metric("switches_total", replica, mode=event.mode).inc()
        self._take_queue(replica, event.running, event.waiting)
        self._metric("pending_prefill_tokens", replica).set(event.pending_tokens)
        self._increase("exchanged_bytes_total", replica, event.exchanged_bytes)
        self._increase("exchanges_total", replica, event.exchanges)
        if event.seconds is not None:
            self._metric("step_time_seconds", replica, **labels).observe(event.seconds)
            if (predicted := event.predicted.get(event.mode)) is not None:
                self._metric("predicted_step_time_seconds_total", replica, **labels).inc(predicted)
                self._metric("measured_step_time_seconds_total", replica, **labels).inc(event.seconds)
        if event.chunk_room is not None and event.chunk_budget is not None:
            self._metric("chunk_tokens", replica).observe(event.prefill_tokens)
            self._metric("chunk_room_tokens", replica).observe(event.chunk_room)
            self._metric("chunk_budget_seconds", replica).observe(max(0.0, event.chunk_budget))
        for seconds, count in event.gaps:
            observe(self._metric("token_gap_seconds", replica), seconds, count)
        for figures in (request.sparse for request in event.finished):
            if figures is not None and figures.tokens:
                self._metric("sparse_tokens_total", replica).inc(figures.tokens)
                self._metric("sparse_dropped_mass", replica).observe(figures.max)
                self._metric("sparse_computed_share", replica).observe(figures.computed)
        if missing := self._gaps.count_missing(event):
            self._metric("events_dropped_total", replica).inc(missing)

    def _take_state(self, event: StateEvent) -> None:
        replica = event.replica
        self._take_queue(replica, event.running, event.waiting)
        if event.running == event.waiting == 0:
            self._metric("pending_prefill_tokens", replica).set(0)
        for mode in MODES:
            if (ratio := event.drift.get(mode)) is not None:
                self._metric("step_time_ratio", replica, mode=mode).set(ratio)
        self._metric("tbt_target_seconds", replica).set(event.tbt_target)
        self._metric("tbt_margin", replica).set(event.tbt_margin)
        beyond = event.weight_bytes_beyond_base
        self._metric("weight_bytes", replica, kind="base").set(event.weight_bytes - beyond)
        self._metric("weight_bytes", replica, kind="beyond_base").set(beyond)

    def _take_instances(self, event: InstancesEvent) -> None:
        replica = event.replica
        for level in event.levels:
            count = sum(each["level"] == level for each in event.instances)
            self._metric("instances", replica, level=str(level)).set(count)
        predictions = event.policy.get("predictions", {})
        self._predicted.update(predictions)
        for layout in self._predicted:  # in several processes, Prometheus's client cannot remove labels
            predicted = predictions.get(layout, NOT_PREDICTED)
            self._metric("instance_predicted_seconds", replica, layout=layout).set(predicted["seconds"])
            self._metric("instance_predicted_loss", replica, layout=layout).set(predicted["loss"])
        for change in event.last:
            if change["epoch"] <= self._epoch:
                continue
            self._epoch = change["epoch"]
            result = "done" if change["ok"] else "given up"
            self._metric("instance_changes_total", replica, level=str(change["level"]), result=result).inc()
            for phase, seconds in change["phases"].items():
                self._metric("instance_change_seconds_total", replica, phase=phase).inc(seconds)
            self._metric("instance_change_bytes_total", replica).inc(change["bytes_sent"])
            self._metric("instance_recomputed_tokens_total", replica).inc(change["tokens_recomputed"])

    def _take_queue(self, replica: int, running: int, waiting: int) -> None:
        self._metric("queue_requests", replica, state="running").set(running)
        self._metric("queue_requests", replica, state="waiting").set(waiting)


def observe(histogram: Any, value: float, count: int) -> None:
    """Count equal values at once, as SGLang does: hundreds of requests may decode in each step.

    Args:
        histogram: A ``Histogram`` of prometheus_client, with its labels.
        value: The value.
        count: How many of it there are.
    """
    histogram._sum.inc(value * count)
    histogram._buckets[bisect_left(histogram._upper_bounds, value)].inc(count)
