"""The Prometheus metrics, scraped as SGLang does: from the files of the multiprocess mode, in another process."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from harness import REPO

FEED = """
import sys
from sglang_shift.observe.events import Finished, InstancesEvent, SparseFigures, StateEvent, StepEvent
from sglang_shift.observe.metrics import Metrics

metrics = Metrics({"model_name": "demo", "cluster": "a"})
assert "prometheus_client" not in sys.modules, "imported before PROMETHEUS_MULTIPROC_DIR is set"
import os
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]

def step(number, mode="tp", phase="decode", tokens=4, exchanged=0, replica=0, **more):
    metrics(StepEvent(time=1.0, step=number, mode=mode, phase=phase, tokens=tokens, prefill_tokens=0, running=3,
                      waiting=2, pending_tokens=90, exchanged_bytes=exchanged, exchanges=exchanged // 10,
                      replica=replica, **more))

def state(replica=0, drift=None, **more):
    metrics(StateEvent(time=1.0, world_size=2, sp_size=2, model="x", policy="tokens", policy_text="", calibration=None,
                       calibration_text="", drift=drift or {"tp": None, "sp": None}, weight_bytes=100,
                       weight_bytes_beyond_base=30, steps={}, tokens={}, switches=0, replica=replica, **more))

state()
step(1, seconds=0.0004, predicted={"tp": 0.0002, "sp": 7.0})
step(2, seconds=0.004, predicted={"tp": 0.003, "sp": 7.0}, replayed=True)
step(3, "sp", "prefill", 300, exchanged=1000, switched=True, seconds=0.2)
step(7, "sp", "mixed", 20, exchanged=1500, predicted={"tp": 7.0, "sp": 0.5}, replayed=False)
step(8, "tp", "decode", 1, exchanged=1500, switched=True, seconds=99.0)
state(drift={"tp": 1.25, "sp": None}, running=3, waiting=1)
step(1, "sp", "prefill", 10, exchanged=200)  # the rank restarted
step(1, "sp", "prefill", 5, exchanged=50, replica=1)
state(replica=1)
step(1, "sp", "mixed", 700, replica=2, chunk_room=900, chunk_budget=0.05)
step(2, "sp", "mixed", 700, replica=2, chunk_room=600, chunk_budget=-0.05)
step(3, replica=2)
done = [SparseFigures(900, 0.001, 0.01, 0.04, 0.7), SparseFigures(0, 0, 0, 0, 1, "it has images"), None]
step(1, replica=3, finished=[Finished(1000, 2, 0.1, None, 0.2, {}, sparse) for sparse in done])
state(replica=2, tbt_target=0.1, tbt_margin=0.75)
step(4, replica=2, gaps=[(0.02, 300), (0.021, 2), (75.0, 1)])

change = dict(level=2, ok=True, phases={"quiesce": 0.25, "exchange": 0.5}, bytes_sent=1000, tokens_recomputed=3)
for count in (1, 2, 2):  # the last changes come again with each event
    last = [{**change, "epoch": 1}, {**change, "epoch": 2, "ok": False, "bytes_sent": 0}][:count]
    metrics(InstancesEvent(time=1.0, levels=[1, 2], epoch=count, instances=[{"level": 2}, {"level": 1}, {"level": 1}],
                           last=last, replica=4,
                           policy={"predictions": {"2+1+1": {"loss": 0.25, "seconds": 1.5 * count},
                                                   **({"2+2": {"loss": 0.0, "seconds": 1.0}} if count == 1 else {})}}))
"""

SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.fixture(scope="module")
def scraped(tmp_path_factory) -> dict[tuple[str, frozenset], float]:
    from prometheus_client.parser import text_string_to_metric_families

    folder = tmp_path_factory.mktemp("prometheus")
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    subprocess.run([sys.executable, "-c", FEED, str(folder)], env=environment, check=True)
    assert list(folder.glob("*.db"))
    text = subprocess.run(
        [sys.executable, "-c", SCRAPE],
        env={**environment, "PROMETHEUS_MULTIPROC_DIR": str(folder)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert samples and all(s.labels["model_name"] == "demo" and s.labels["cluster"] == "a" for s in samples)
    return {
        (
            s.name.removeprefix("sglang_shift:"),
            frozenset((k, v) for k, v in s.labels.items() if k not in SHARED),
        ): s.value
        for s in samples
    }


SHARED = ("model_name", "cluster")


@pytest.fixture
def value(scraped):
    return lambda name, replica="0", **labels: scraped[name, frozenset({"replica": replica, **labels}.items())]


def test_steps_and_tokens(value):
    assert value("steps_total", mode="tp", phase="decode") == 3
    assert value("tokens_total", mode="tp", phase="decode") == 9
    assert value("steps_total", mode="sp", phase="prefill") == 2
    assert value("tokens_total", mode="sp", phase="prefill") == 310
    assert value("tokens_total", mode="sp", phase="mixed") == 20
    assert value("steps_total", replica="1", mode="sp", phase="prefill") == 1


def test_a_step_that_found_no_graph_counts_and_one_without_graphs_does_not(value):
    assert value("eager_steps_total", mode="sp", phase="mixed") == 1
    assert (
        value("eager_steps_total", mode="tp", phase="decode")
        == value("eager_steps_total", mode="sp", phase="prefill")
        == 0
    )


def test_counters_start_at_zero(value):
    assert value("steps_total", mode="tp", phase="mixed") == 0
    assert value("switches_total", replica="1", mode="sp") == 0


def test_switches_and_queue(value):
    assert value("switches_total", mode="sp") == value("switches_total", mode="tp") == 1
    assert value("queue_requests", state="running") == 3 and value("queue_requests", state="waiting") == 2
    assert value("pending_prefill_tokens") == 90
    assert value("pending_prefill_tokens", replica="1") == value("queue_requests", replica="1", state="waiting") == 0


def test_cumulative_values_become_increments_and_survive_a_restart(value):
    assert value("exchanged_bytes_total") == 1500 + 200
    assert value("exchanges_total") == 150 + 20
    assert value("exchanged_bytes_total", replica="1") == 50


def test_step_times(value):
    labels = {"mode": "tp", "phase": "decode"}
    buckets = {le: value("step_time_seconds_bucket", le=le, **labels) for le in ("0.0005", "0.003", "0.005", "+Inf")}
    assert buckets == {"0.0005": 1, "0.003": 1, "0.005": 2, "+Inf": 3}
    assert value("step_time_seconds_count", **labels) == 3
    assert value("step_time_seconds_sum", **labels) == pytest.approx(99.0044)


def test_predicted_and_measured_count_the_same_steps(value):
    labels = {"mode": "tp", "phase": "decode"}
    assert value("predicted_step_time_seconds_total", **labels) == pytest.approx(0.0032)
    assert value("measured_step_time_seconds_total", **labels) == pytest.approx(0.0044)


def test_no_value_without_a_measurement(scraped, value):
    assert value("step_time_ratio", mode="tp") == 1.25
    ratios = [labels for name, labels in scraped if name == "step_time_ratio"]
    assert len(ratios) == 1
    assert not any(name.startswith("predicted") and ("mode", "sp") in labels for name, labels in scraped)


def test_weights_and_dropped_events(value):
    assert value("weight_bytes", kind="base") == 70 and value("weight_bytes", kind="beyond_base") == 30
    assert value("events_dropped_total") == 3 and value("events_dropped_total", replica="1") == 0


def test_every_metric_is_documented_and_has_a_value(scraped):
    from sglang_shift.observe.metrics import METRICS, PREFIX

    documented = (REPO / "docs" / "observing.md").read_text()
    for name, metric in METRICS.items():
        assert (name if metric.kind != "histogram" else f"{name}_bucket") in {n for n, _ in scraped}
        assert f"`{PREFIX}{name}`" in documented, name


def test_instances(value):
    assert value("instances", "4", level="1") == 2 and value("instances", "4", level="2") == 1
    assert value("instance_changes_total", "4", level="2", result="done") == 1
    assert value("instance_changes_total", "4", level="2", result="given up") == 1
    assert value("instance_change_seconds_total", "4", phase="exchange") == 1.0
    assert value("instance_predicted_seconds", "4", layout="2+1+1") == 3.0
    assert value("instance_predicted_loss", "4", layout="2+1+1") == 0.25
    for gauge in ("instance_predicted_seconds", "instance_predicted_loss"):
        assert math.isnan(value(gauge, "4", layout="2+2")), "it is not predicted any more"
    assert value("instance_change_bytes_total", "4") == 1000 and value("instance_recomputed_tokens_total", "4") == 6


def test_the_bound_on_the_gap_between_tokens(scraped, value):
    assert value("tbt_target_seconds", replica="2") == 0.1
    assert value("tbt_margin", replica="2") == 0.75
    assert value("tbt_target_seconds") == 0
    assert value("chunk_room_tokens_bucket", replica="2", le="512.0") == 0
    assert value("chunk_room_tokens_bucket", replica="2", le="1024.0") == 2
    assert value("chunk_room_tokens_sum", replica="2") == 1500
    assert value("chunk_tokens_count", replica="2") == 2
    assert value("chunk_budget_seconds_sum", replica="2") == pytest.approx(0.05)
    assert ("chunk_tokens_count", frozenset({("replica", "0")})) not in scraped


def test_gaps_between_tokens(value):
    """Equal gaps are counted at once. The largest bucket has no end."""
    buckets = {le: value("token_gap_seconds_bucket", "2", le=le) for le in ("0.015", "0.02", "0.03", "60.0", "+Inf")}
    assert buckets == {"0.015": 0, "0.02": 300, "0.03": 302, "60.0": 302, "+Inf": 303}
    assert value("token_gap_seconds_count", "2") == 303
    assert value("token_gap_seconds_sum", "2") == pytest.approx(300 * 0.02 + 2 * 0.021 + 75)


def test_what_sparse_requests_left_out(value):
    """A request that left out nothing, because it had to be exact, is not among them."""
    assert value("sparse_tokens_total", replica="3") == 900
    assert value("sparse_dropped_mass_count", replica="3") == value("sparse_computed_share_count", replica="3") == 1
    assert value("sparse_dropped_mass_sum", replica="3") == pytest.approx(0.04)
    assert value("sparse_dropped_mass_bucket", replica="3", le="0.03") == 0
    assert value("sparse_dropped_mass_bucket", replica="3", le="0.05") == 1
    assert value("sparse_computed_share_bucket", replica="3", le="0.65") == 0
    assert value("sparse_computed_share_bucket", replica="3", le="0.7") == 1
