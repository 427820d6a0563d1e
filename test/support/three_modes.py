"""Tests a family of three modes. ``test/unit/test_modes.py`` runs these tests with the plugin ``third_mode``.

On the made-up machine TP is the fastest mode up to about 100 tokens, and SP is the fastest up to about 1000 tokens. The
third mode is the fastest above.
"""

from __future__ import annotations

import io
import json
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from sglang_shift.config import ShiftConfig
from sglang_shift.cost.calibration import Calibration, CalibrationError, load, save
from sglang_shift.cost.measure import Results, StepShape, measure
from sglang_shift.cost.model import PHASES, CostModel, Curve, Measurement, fit
from sglang_shift.flags import POLICIES
from sglang_shift.graphs.mode_graphs import PhaseGraphs
from sglang_shift.graphs.plan import plan_graphs
from sglang_shift.modes import MODES, Mode, StepState
from sglang_shift.observe import routes
from sglang_shift.observe.events import Finished, StateEvent, StepEvent
from sglang_shift.observe.hub import Hub
from sglang_shift.observe.metrics import Metrics
from sglang_shift.policy.builtin import Calibrated, FixedMode
from sglang_shift.policy.probes import PROBE_INTERVAL
from sglang_shift.policy.selector import DOUBTS, DRIFT_STEPS, Drift, ModeSelector, make_policy
from sglang_shift.runtime.agreement import StepWatch
from sglang_shift.runtime.reporter import ShiftOutputStreamer, finished_requests
from sglang_shift.simulate.simulator import Server, simulate
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.benchmark.watch import Watch, read_metrics
from sglang_shift.tools.servers import free_port
from sglang_shift.tools.status_view import view

TP, SP, THIRD = MODES
TOKENS = [2**i for i in range(13)]


def seconds(mode: Mode, tokens: int) -> float:
    start, each = {TP: (1.0, 1e-2), SP: (1.5, 5e-3), THIRD: (4.0, 2.5e-3)}[mode]
    return start + each * tokens


def measurements() -> list[Measurement]:
    return [Measurement(p, mode, n, n, seconds(mode, n)) for p in PHASES for mode in MODES for n in TOKENS]


def constant(**by_mode: float) -> CostModel:
    """Return step times that do not depend on the tokens."""
    curves = {mode: Curve((1,), (by_mode[mode.value],)) for mode in MODES}
    flat = dict.fromkeys(PHASES, Curve((1,), (1.0,)))
    return CostModel(dict.fromkeys(PHASES, curves), flat, dict.fromkeys(PHASES, 0.0), 0.0)


def test_a_step_and_the_names():
    assert StepState(5, padded={THIRD: 8}).padded == {TP: 5, SP: 5, THIRD: 8}
    assert POLICIES[-3:] == ("tp", "sp", "third")
    assert make_policy(ShiftConfig(2, 2, True, "third"), None, 8) == FixedMode(THIRD)


def test_predictions_are_fitted_to_all_modes():
    costs = fit(measurements())
    for m in measurements():
        step = StepState(m.tokens, m.tokens * (m.phase == "prefill"), kv_reads=m.kv_reads)
        assert costs.predict(m.mode, step) == pytest.approx(m.seconds, rel=0.01)
    for phase in PHASES:
        (one, first), (to_sp, second), (to_third, last) = costs.crossovers(phase)
        assert (one, first, second, last) == (1, TP, SP, THIRD)
        assert to_sp == pytest.approx(101, abs=3) and to_third == pytest.approx(1001, abs=30)
    policy = Calibrated(costs, 8192)
    assert [policy.choose(StepState(n)) for n in (10, 500, 4000)] == [TP, SP, THIRD]
    assert policy.explain(StepState(4000), THIRD).startswith("THIRD 14")
    with pytest.raises(ValueError, match="in every mode"):
        fit([m for m in measurements() if m.mode is not THIRD])


def test_curves_that_cross_between_two_points():
    """All three lines have points at 1 and 1001 tokens only."""
    curves = {mode: Curve((1, 1001), (seconds(mode, 1), seconds(mode, 1001))) for mode in (TP, SP)}
    curves[THIRD] = Curve((1, 1001), (2.6, 2.6))
    flat = dict.fromkeys(PHASES, Curve((1,), (1.0,)))
    costs = CostModel(dict.fromkeys(PHASES, curves), flat, dict.fromkeys(PHASES, 0.0), 0.0)
    walk = [(n, costs.faster("decode", n)) for n in range(1, 1002)]
    changes = [walk[0], *(b for a, b in pairwise(walk) if a[1] is not b[1])]
    assert costs.crossovers("decode") == changes and [mode for _, mode in changes] == [TP, SP, THIRD]


def test_all_modes_are_measured_and_all_changes_between_them():
    class Bench:
        prepared_shape, now, changes = None, 0.0, set()

        def make_room(self, shape):
            return True

        def prepare(self, shape):
            self.prepared_shape = shape

        def run(self, mode, after=None):
            if after not in (None, mode):
                self.changes.add((after, mode))
            took = 1e-2 * seconds(mode, self.prepared_shape.tokens) + 1e-3 * (after not in (None, mode))
            self.now += took
            return took

        def release(self):
            self.prepared_shape = None

        def agree(self, numbers, failure=""):
            return list(numbers)

    bench, measured = Bench(), Results()
    shapes = [StepShape(phase, n, 0, 9999) for phase in PHASES for n in (1, 8, 512, 4096)]
    list(measure(bench, shapes, 1e9, measured, clock=lambda: bench.now))
    assert bench.changes == {(a, b) for a in MODES for b in MODES if a is not b}
    assert measured.switches == pytest.approx([1e-3] * 4)
    assert {(m.mode, m.tokens, round(100 * m.seconds, 6)) for m in measured.steps} == {
        (mode, n, round(seconds(mode, n), 6)) for mode in MODES for n in (1, 8, 512, 4096)
    }


def test_a_file_of_fewer_modes_is_none(tmp_path):
    calibration = Calibration.from_measurements({"a": 1}, 1.0, measurements(), 0.0)
    save(tmp_path / "c.json", calibration)
    assert load(tmp_path / "c.json", {"a": 1}) == calibration
    content = json.loads((tmp_path / "c.json").read_text())
    for by_mode in content["costs"]["curves"].values():
        del by_mode["third"]
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="no curve for one of the modes tp, sp, third"):
        load(tmp_path / "c.json", {"a": 1})


def test_both_other_modes_are_probed():
    selector = ModeSelector(Calibrated(constant(tp=0.01, sp=0.0101, third=0.0102), 512))
    decisions = [selector.choose(StepState(4)) for _ in range(100 * PROBE_INTERVAL)]
    probes = {mode: sum(d.probe and d.mode is mode for d in decisions) for mode in MODES}
    assert probes[TP] == 0 and probes[SP] > 50 and probes[THIRD] > 50
    assert selector.counters()["steps"] == {
        "tp": len(decisions) - sum(probes.values()),
        "sp": probes[SP],
        "third": probes[THIRD],
    }


def test_drift_names_the_mode_that_has_become_slower():
    drift = Drift()
    for _ in range(DRIFT_STEPS):
        for mode in MODES:
            drift.add(mode, 1.0, 2.0 if mode is THIRD else 1.0)
    assert drift.drifted and {mode: drift.ratio(mode) for mode in MODES} == {TP: 1, SP: 1, THIRD: 2}
    assert drift.doubts == {("decode", THIRD, TP): 1.0, ("decode", THIRD, SP): 1.0}
    assert set(drift.doubts) <= set(DOUBTS) and len(DOUBTS) == 2 * 6


def test_a_tie_with_the_fastest_mode_goes_by_the_queue():
    """The third mode should be the fastest, but SP may be faster. TP is far slower."""
    selector = ModeSelector(Calibrated(constant(tp=0.1, sp=0.011, third=0.01), 512))
    selector.set_doubts({("decode", THIRD, SP): 1.0})
    assert [selector.choose(StepState(4, num_waiting=n)).mode for n in (0, 99)] == [THIRD, SP]


def test_graphs_of_each_mode():
    plan = plan_graphs((1, 2, 4), ShiftConfig(2, 2, True, "calibrated"))
    assert plan.sizes == {TP: (1, 2, 4), SP: (2, 4), THIRD: (1, 2, 4)}
    graphs = PhaseGraphs(plan)
    graphs.sets[THIRD].sizes = (1, 2, 4)
    assert graphs.padded(3) == {TP: 4, SP: 3, THIRD: 4}
    assert graphs.count(THIRD, True) and graphs.report()["third"]["replayed"] == 1


def test_ranks_in_different_modes_are_noticed():
    entries = {}
    store = SimpleNamespace(set=entries.__setitem__, get=entries.__getitem__, check=lambda keys: keys[0] in entries)
    first, other = (StepWatch(rank, store) for rank in range(2))
    first.record(4, 0, SP)
    other.record(4, 0, THIRD)
    assert first.compare() is None and "in SP on rank 0" in (problem := other.compare()) and "in THIRD" in problem


def test_the_simulator():
    result = simulate([Request(0, 10, 3)], FixedMode(THIRD), fit(measurements()), Server(buckets={THIRD: (1, 8)}))
    assert result.steps == {TP: 0, SP: 0, THIRD: 3}


def test_the_counters_of_a_request():
    times = SimpleNamespace(
        prefill_finished_time=2.0,
        completion_time=3.0,
        wait_queue_entry_time=1.0,
        decode_prealloc_queue_entry_time=0.0,
        scheduler_recv_time=1.0,
    )
    steps = {TP: 1, SP: 0, THIRD: 4}
    req = SimpleNamespace(
        finished=lambda: True, time_stats=times, output_ids=[1, 2], origin_input_ids=[1], shift_steps=steps
    )
    [finished] = finished_requests([req])
    assert finished.steps == steps
    info = ShiftOutputStreamer.build_additional_customized_info(None, [req])
    assert info == {"shift_steps": [[{"tp": 1, "sp": 0, "third": 4}]]}


def filled_hub(hub: Hub) -> Hub:
    """Return a hub that has received steps in each mode over the wire format."""
    now, costs = time.time(), fit(measurements())
    calibration = msgspec.to_builtins(Calibration.from_measurements({}, 1.0, measurements(), 0.0))
    events: list[StateEvent | StepEvent] = [
        StateEvent(
            now, 4, 2, "demo", "calibrated", "the fastest mode", calibration, "made up", {mode: 1.5 for mode in MODES},
            1, 0, dict.fromkeys(MODES, 7), dict.fromkeys(MODES, 70), 2,
        )
    ]  # fmt: skip
    for number, (mode, tokens) in enumerate(zip(MODES, (8, 512, 4096), strict=True), 1):
        predicted = {m: costs.predict(m, StepState(tokens)) for m in MODES}
        done = [Finished(10, 5, 0.1, 0.1, 0.5, {mode: number})]
        events.append(StepEvent(
            now, number, mode, "decode", tokens, 0, 1, 0, 0, number / 100, predicted, switched=True, reason="why",
            finished=done,
        ))  # fmt: skip
    for event in events:
        hub.take(msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=type(event)))
    return hub


def test_events_reach_the_page_data_and_the_terminal():
    now = time.time()
    clock = iter([now] * 5 + [now + 1.5])
    value = filled_hub(Hub(clock=lambda: next(clock))).snapshot()
    value = json.loads(msgspec.json.encode(value))
    assert value["modes"] == ["tp", "sp", "third"] and value["events"]["malformed"] == 0
    assert value["minute"]["steps"] == {"tp": 1, "sp": 1, "third": 1}
    assert value["totals"]["tokens"] == {"tp": 70, "sp": 70, "third": 70}
    assert value["history"]["tokens"]["third"][-2:].count(4096) == 1
    assert value["requests"]["steps"] == {"tp": 1, "sp": 2, "third": 3}
    assert value["replicas"][0]["drift"]["third"] == 1.5
    row = next(row for row in value["step_times"] if row["mode"] == "third")
    assert row["p50"] == 0.03 and row["actual_over_predicted"] == pytest.approx(0.03 / 14.24, rel=0.01)
    console = Console(file=io.StringIO(), width=140)  # the view has one sentence more than with two modes
    console.print(view(value, "http://a"))
    text = console.file.getvalue()
    assert "SP 33% of the time, 1 of 3 steps; THIRD 50% of the time, 1 of 3 steps" in text
    assert "THIRD decode" in text and "TP 1, SP 51, THIRD 410" in text
    [bar] = [line for line in text.splitlines() if line.startswith("Modes")]
    assert [bar.count(block) for block in "█▒▓"] == [5, 9, 14], "a sixth, a third and a half of 28"


def test_metrics_have_the_label():
    from prometheus_client import REGISTRY, generate_latest

    hub = Hub()
    hub.listeners.append(Metrics({"model_name": "demo"}))
    filled_hub(hub)
    metrics = read_metrics(generate_latest(REGISTRY).decode())
    assert metrics["sglang_shift:step_time_ratio{third}"] == [1.5]
    assert sum(metrics["sglang_shift:steps_total{third}"]) == 1
    assert metrics["sglang_shift:predicted_step_time_seconds_total{third}"] == [pytest.approx(14.24, rel=0.01)]
    watch = Watch("http://nowhere")
    watch._first = {}
    assert watch._sample(metrics, 1.0).steps == dict.fromkeys(MODES, 1)


def test_the_page(browser):
    hub, app = filled_hub(Hub()), FastAPI()
    routes.install(hub, app)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        browser.open(f"http://127.0.0.1:{port}/shift", width=1280)
        browser.wait("document.querySelector('#connection')?.textContent === 'live'")
        browser.wait("document.querySelector('#c-modes path.third-area') !== null", 5)

        def words(selector: str) -> str:
            return browser.evaluate(f"document.querySelector({selector!r}).textContent")

        assert words("#h-share") == "Time in SP, THIRD" and words("#t-share") == "33\u00a0%, 50\u00a0%"
        assert words("#n-share") == "1, 1 of 3 steps in the last minute"
        assert words("#a-rate").endswith("THIRD on top of SP on top of TP.")
        assert "THIRD decode" in words("#b-steps") and "THIRD 1.50" in words("#n-drift")
        assert words("#l-calibration") == "TPSPTHIRDmeasured TPmeasured SPmeasured THIRD"
        crossovers = [[n, mode.value] for n, mode in fit(measurements()).crossovers("decode")]
        assert browser.evaluate("crossovers(data.calibration.costs.curves.decode)") == crossovers
        assert "THIRD from" in words("#c-decode") and len(crossovers) == 3
        shapes = "new Set([...document.querySelectorAll('#c-steps path.dot')].map(p => getComputedStyle(p).fill)).size"
        assert browser.evaluate(shapes) == 3, "each mode has its colour"
        assert browser.problems == []
    finally:
        server.should_exit = True
        thread.join(10)
