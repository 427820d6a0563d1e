"""Measuring step times, keeping them, and what happens when that goes wrong."""

from __future__ import annotations

import json
import logging
import math
import pwd
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from harness import run_ranks
from sglang_shift.config import ShiftConfig
from sglang_shift.cost import calibration
from sglang_shift.cost.calibration import Calibration, CalibrationError, load, save
from sglang_shift.cost.exchange_gain import ExchangeGain
from sglang_shift.cost.measure import MAX_LAPS, Results, StepShape, grid, kv_reads, measure, powers
from sglang_shift.cost.model import Measurement
from sglang_shift.modes import Mode
from sglang_shift.policy.selector import DRIFT_STEPS, Drift
from sglang_shift.runtime import calibration_key, calibrator
from sglang_shift.runtime.exchange_pipeline import ExchangePipeline
from sglang_shift.runtime.scheduler import ShiftScheduler

KEY = {"architecture": "X", "tp_size": 2}
CONFIG = ShiftConfig(2, 2, True, "calibrated", calibration="auto")


SWITCH = 3e-4


def seconds(mode: Mode, shape: StepShape) -> float:
    """A machine on which TP is faster up to 99 tokens."""
    base, slope = (1e-3, 2e-5) if mode is Mode.TP else (2e-3, 1e-5)
    return base + slope * shape.tokens + 1e-9 * shape.kv_reads


class FakeBench:
    """Runs shapes in no time; knows what it was asked."""

    def __init__(self, scheduler=None, fails: Mode | None = None, slow: float = 1.0, room: int = 100_000) -> None:
        self.fails, self.slow, self.room = fails, slow, room
        self.now, self.prepared_shape, self.laps, self.last = 0.0, None, [], None

    def make_room(self, shape):
        return shape.slots <= self.room

    def prepare(self, shape):
        assert self.prepared_shape is None, "the shape before was not released"
        self.prepared_shape = shape

    def run(self, mode, after=None):
        if mode is self.fails:
            raise MemoryError("no room")
        switched = (after or mode) is not mode
        took = self.slow * seconds(mode, self.prepared_shape) + SWITCH * switched
        self.now += took
        self.laps.append((self.prepared_shape, mode))
        return took

    def release(self):
        self.prepared_shape = None

    def agree(self, numbers, failure=""):
        return list(numbers)


def shapes_of(chunk=512, requests=64, longest=4095, slots=20_000):
    return grid(chunk, requests, longest, slots)


def test_grid_covers_both_phases_and_fits():
    shapes = shapes_of()
    for phase, most in (("prefill", 512), ("decode", 64)):
        mine = [s for s in shapes if s.phase == phase]
        assert {1, most} <= {s.tokens for s in mine}
        assert len({s.context for s in mine}) > 1, "one context alone does not tell the cost of attention"
    assert all(s.slots <= 20_000 for s in shapes)
    assert all(cached + new <= 4095 for s in shapes for cached, new in s.requests)
    assert all(sum(new for _, new in s.requests) == s.tokens for s in shapes)


@pytest.mark.parametrize("slots", [2, 64, 300])
def test_grid_of_a_tiny_pool(slots):
    shapes = shapes_of(slots=slots)
    assert {"prefill", "decode"} == {s.phase for s in shapes}
    assert all(s.slots <= slots for s in shapes)


def test_a_chunk_longer_than_the_model_is_several_requests():
    shape = StepShape("prefill", 1000, 0, 300)
    assert shape.requests == [(0, 300), (0, 300), (0, 300), (0, 100)]
    assert shape.kv_reads == 3 * 300 * 301 // 2 + 100 * 101 // 2


def test_kv_reads_by_brute_force():
    for cached, new in ((0, 1), (0, 7), (5, 3), (100, 1)):
        assert kv_reads(cached, new) == sum(cached + i + 1 for i in range(new))


def test_decode_shapes_verify_drafts():
    """With speculative decoding, each request of a decode shape has new tokens for all its drafts."""
    shapes = [shape for shape in grid(512, 64, 4095, 20_000, width=4) if shape.phase == "decode"]
    assert {4, 256} <= {shape.tokens for shape in shapes}
    assert all({new for _, new in shape.requests} == {4} for shape in shapes)
    assert all(sum(new for _, new in shape.requests) == shape.tokens for shape in shapes)
    assert all(shape.slots <= 20_000 for shape in shapes)


def test_powers():
    assert powers(1) == [1]
    assert powers(8) == [1, 2, 4, 8]
    assert powers(12) == [1, 2, 4, 8, 12]


def test_measuring_finds_the_crossover():
    bench, results = FakeBench(), Results()
    parts = [results.progress for _ in measure(bench, shapes_of(), 60, results, clock=lambda: bench.now)]
    assert parts == sorted(parts)
    assert results.progress == 1
    costs = Calibration.from_measurements(KEY, results.seconds, results.steps, 0.0).costs
    assert costs.crossovers("decode")[0] == (1, Mode.TP)
    (start, _), (crossover, mode) = costs.crossovers("prefill")
    assert (start, mode) == (1, Mode.SP)
    assert 95 < crossover < 105
    assert bench.prepared_shape is None


def test_modes_take_turns():
    bench = FakeBench()
    list(measure(bench, [StepShape("prefill", 64, 0, 4095)], 60, Results(), clock=lambda: bench.now))
    modes = [mode for _, mode in bench.laps]
    assert modes == [Mode.TP, Mode.SP] * (len(modes) // 2)
    assert 2 * 4 <= len(modes) <= 2 * (MAX_LAPS + 1)


def test_the_budget_leaves_out_large_shapes_but_never_a_phase():
    bench, results = FakeBench(slow=1000.0), Results()
    list(measure(bench, shapes_of(), 30, results, clock=lambda: bench.now))
    assert results.seconds < 60
    assert {(m.phase, m.mode) for m in results.steps} == {(p, m) for p in ("prefill", "decode") for m in Mode}
    assert max(m.tokens for m in results.steps) < 512


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_that_fails_is_named(mode):
    bench = FakeBench(fails=mode)
    with pytest.raises(CalibrationError, match=f"{mode.value.upper()} failed.*no room") as error:
        list(measure(bench, shapes_of(), 60, Results()))
    assert error.value.broken is mode
    assert bench.prepared_shape is None, "its slots were given back"


def measured() -> Calibration:
    bench, results = FakeBench(), Results()
    list(measure(bench, shapes_of(), 60, results, clock=lambda: bench.now))
    return Calibration.from_measurements(KEY, results.seconds, results.steps, 1e-5)


def test_saved_and_loaded(tmp_path):
    file = tmp_path / "folder" / "c.json"
    save(file, measured())
    again = load(file, KEY)
    assert again == replace(measured(), made=again.made)
    assert [p.name for p in file.parent.iterdir()] == ["c.json"], "no temporary file is left"


def test_a_foreign_calibration_says_what_differs(tmp_path):
    save(tmp_path / "c.json", measured())
    with pytest.raises(CalibrationError, match="made for something else: tp_size is 2 there and 4 here"):
        load(tmp_path / "c.json", {**KEY, "tp_size": 4})


def broken_files():
    good = json.loads(msgspec.json.encode(measured()))
    return {
        "not JSON": "{",
        "a list": "[]",
        "another format": json.dumps({**good, "format": 99}),
        "the first format": json.dumps({**good, "format": 1, "costs": {"curves": {"decode tp": {}}}}),
        "no costs": json.dumps({k: v for k, v in good.items() if k != "costs"}),
        "negative times": json.dumps(good).replace('"seconds": 0.', '"seconds": -0.'),
        "not a number": json.dumps(good).replace('"switch_seconds": 1e-05', '"switch_seconds": NaN'),
        "a curve that falls": json.dumps(
            {**good, "costs": {**good["costs"], "curves": {
                phase: {mode: {**c, "values": [*c["values"][:-1], 1e-9]} for mode, c in by_mode.items()}
                for phase, by_mode in good["costs"]["curves"].items()
            }}}
        ),
    }  # fmt: skip


@pytest.mark.parametrize("what", broken_files())
def test_a_broken_file_is_one_sentence(tmp_path, what):
    file = tmp_path / "c.json"
    file.write_text(broken_files()[what])
    with pytest.raises(CalibrationError) as error:
        load(file, KEY)
    assert str(file) in str(error.value)


def test_too_few_measurements():
    with pytest.raises(CalibrationError, match="incomplete"):
        Calibration.from_measurements(KEY, 1.0, [Measurement("prefill", Mode.TP, 1, 1, 0.1)], 0.0)


class FakeScheduler:
    """What a Calibrator asks of the scheduler; one rank."""

    max_running_requests = 64
    shift_width = 1
    server_args = SimpleNamespace(**dict.fromkeys(calibration_key.SERVER_ARGS))
    tp_group = SimpleNamespace(
        rank_in_group=0, broadcast_object=lambda value, src: value, all_gather_object=lambda value: [value, value]
    )
    model_config = SimpleNamespace(
        context_len=4096,
        dtype="float32",
        hf_config=SimpleNamespace(architectures=["X"], to_dict=lambda: {"hidden_size": 8}),
    )
    req_to_token_pool = SimpleNamespace(available_size=lambda: 64)
    token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 20_000)
    tp_worker = SimpleNamespace(
        model_runner=SimpleNamespace(
            attn_backend=object(), kv_cache_dtype="float32", graphs=SimpleNamespace(captured_sizes=dict)
        )
    )

    def __init__(self):
        self.weight_updater = SimpleNamespace(offload_tags=set(), _session=None)
        self.idle = True

    def is_fully_idle(self):
        return self.idle


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A calibrator on a fake bench, whose cache is ``tmp_path``."""
    monkeypatch.setenv(calibration.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration_key, "get_schedule", lambda: SimpleNamespace(page_size=1))
    monkeypatch.setattr(calibration_key, "resolution_result", getattr)

    def build(config=CONFIG, obtained="collective", **bench):
        topology = SimpleNamespace(exchange=SimpleNamespace(text=obtained))
        monkeypatch.setattr(FakeScheduler.tp_worker.model_runner, "topology", topology, raising=False)
        monkeypatch.setattr(calibrator, "SchedulerBench", lambda scheduler: FakeBench(**bench))
        monkeypatch.setattr(calibrator, "measure", lambda fake, *args: measure(fake, *args, clock=lambda: fake.now))
        return calibrator.Calibrator(FakeScheduler(), config, 512)

    return build


def test_the_first_start_measures_and_the_second_reuses(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = make()
    assert first.start() is not None
    (file,) = tmp_path.iterdir()
    assert "saved as" in first.text
    second = make()
    assert msgspec.json.encode(second.start()) == msgspec.json.encode(json.loads(file.read_text()))
    assert str(file) in second.text
    assert not second.bench.laps, "nothing was measured"


def test_another_exchange_has_times_of_its_own(make, tmp_path):
    make().start()
    other = make(obtained="flashinfer, nvlink")
    assert other.start() is not None and other.bench.laps
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_cache_is_measured_again(make, tmp_path, caplog):
    make().start()
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert make().start() is not None
    assert "cannot be read" in caplog.text
    json.loads(file.read_text())


def test_a_file_of_the_first_format_is_measured_again(make, tmp_path, caplog):
    make().start()
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    mine = make()
    assert mine.start() is not None and mine.bench.laps
    assert "it has format 1, not 2" in caplog.text
    assert json.loads(file.read_text())["format"] == 2


def test_a_file_of_the_users_is_written_if_it_does_not_exist(make, tmp_path):
    config = replace(CONFIG, calibration=str(tmp_path / "mine.json"))
    assert make(config).start() is not None
    assert make(config).start() is not None
    assert [f.name for f in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("content", ["{", "foreign"])
def test_a_file_of_the_users_that_does_not_fit_is_left_alone(make, tmp_path, content, caplog):
    file = tmp_path / "mine.json"
    file.write_text(msgspec.json.encode(measured()).decode() if content == "foreign" else content)
    before = file.read_text()
    mine = make(replace(CONFIG, calibration=str(file)))
    assert mine.start() is None
    assert file.read_text() == before
    assert "made for something else" in mine.text if content == "foreign" else "cannot be read" in mine.text
    assert mine.text in caplog.text


def test_a_cache_that_cannot_be_written_does_not_matter(make, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(calibration.CACHE_VARIABLE, str(tmp_path / "file"))
    mine = make()
    assert mine.start() is not None
    assert "not saved" in mine.text


def test_off(make):
    mine = make(replace(CONFIG, calibration="off"))
    assert mine.start() is None
    assert mine.idle(10**6, drifted=True) is None


def test_a_mode_that_cannot_run_does_not_stop_the_start(make, tmp_path, caplog):
    mine = make(fails=Mode.SP)
    assert mine.start() is None
    assert mine.failed_mode is Mode.SP
    assert "SP failed" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [None, Mode.SP])
def test_without_a_calibration_no_exchange_is_pipelined(make, monkeypatch, fails):
    """The comparison of the exchanges was in favour of the pipeline, and the measurement fails after it."""
    pipeline = ExchangePipeline(groups=SimpleNamespace(count=2))
    monkeypatch.setattr(FakeScheduler.tp_worker.model_runner, "exchange_pipeline", pipeline, raising=False)

    def compare(bench, shapes, pipelined, gains):
        gains.append(ExchangeGain(64, 2e-3, 0.5, 0.1))
        yield

    monkeypatch.setattr(calibrator, "compare_exchanges", compare)
    monkeypatch.setattr(calibrator, "first_tokens", lambda gains: 64 if gains else None)
    mine = make(replace(CONFIG, exchange_pipeline="auto"), fails=fails)
    assert (mine.start() is None) is (fails is not None)
    assert pipeline.first_tokens == (None if fails else 64)


def test_drift_is_followed_by_a_new_calibration_while_idle(make):
    mine = make()
    old = mine.start()
    assert mine.idle(10, drifted=True) is None, "too early"
    assert mine.idle(2 * DRIFT_STEPS, drifted=False) is None
    assert mine._measurement_run is None
    mine.bench.slow = 2.0
    steps, new, turns = 4 * DRIFT_STEPS, None, 0
    while new is None and turns < 1000:
        new = mine.idle(steps, drifted=turns == 0)
        assert mine.bench.prepared_shape is None, "between turns all slots are free"
        turns += 1
    assert turns > 10
    assert new.costs.curves["decode"][Mode.TP](8) == pytest.approx(2 * old.costs.curves["decode"][Mode.TP](8))
    assert mine.idle(steps + 2 * DRIFT_STEPS, drifted=True) is None
    assert mine._measurement_run is None, "the next look at drift is later than the first was"


def test_an_idle_server_sleeps_unless_it_measures(make):
    """With ``--sleep-on-idle``, SGLang sleeps for up to a second between two looks."""
    scheduler, sleeps = ShiftScheduler.__new__(ShiftScheduler), []
    scheduler.idle_sleeper = SimpleNamespace(maybe_sleep=lambda: sleeps.append(True))
    scheduler.shift_calibrator = mine = make()
    mine.start()
    scheduler.maybe_sleep_on_idle()
    assert sleeps == [True]
    assert mine.idle(2 * DRIFT_STEPS, drifted=True) is None
    scheduler.maybe_sleep_on_idle()
    assert sleeps == [True], "it measures"
    assert renewed(mine)
    scheduler.maybe_sleep_on_idle()
    assert sleeps == [True, True]


def renewed(mine, turns=1000):
    """The calibration that ``mine`` makes while it idles."""
    for turn in range(turns):
        if new := mine.idle(10**6, drifted=turn == 0):
            return new
        if mine._measurement_run is None:
            break
    return None


def test_what_was_not_measured_again_stays(make, tmp_path):
    """A warm prefix cache leaves few slots: the old curves' ratio holds beyond what fits into them."""
    mine = make()
    old = mine.start()
    (file,) = tmp_path.iterdir()
    mine.bench.slow, mine.bench.room = 1.5, 260
    new = renewed(mine)
    assert len(new.measurements) == len(old.measurements)
    for mode in Mode:
        slower = 1.5 * old.costs.curves["prefill"][mode](128)
        assert new.costs.curves["prefill"][mode](128) == pytest.approx(slower, rel=0.01)
        # Not measured: as much slower as what was.
        for phase, tokens in (("prefill", 512), ("decode", 64)):
            slower = 1.5 * old.costs.curves[phase][mode](tokens)
            assert new.costs.curves[phase][mode](tokens) == pytest.approx(slower, rel=0.01)
    assert new.costs.switch_seconds == pytest.approx(SWITCH)
    assert msgspec.json.decode(file.read_bytes(), type=Calibration) == new


def timed(shapes, tp: float):
    """Measurements of the machine of :func:`seconds`, where TP takes ``tp`` times as long, but for its attention."""

    def took(mode: Mode, s: StepShape) -> float:
        attention = 1e-9 * s.kv_reads
        return attention + (seconds(mode, s) - attention) * (tp if mode is Mode.TP else 1.0)

    return [Measurement(s.phase, mode, s.tokens, s.kv_reads, took(mode, s)) for s in shapes for mode in Mode]


@pytest.mark.parametrize("tp", [0.5, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("room", [140, 260, 2000, 8000])
def test_new_times_do_not_spoil_old_ones_beyond_them(tp, room):
    """Old and new ones disagree by what has drifted, which is no noise of either."""
    shapes = shapes_of(4096, 256, 32_767, 400_000)
    old = Calibration.from_measurements(KEY, 1.0, timed(shapes, 1.0), 0.0)
    some = [s for s in shapes if s.slots <= room]
    new = old.with_measurements(1.0, timed(some, tp), None).costs
    whole = Calibration.from_measurements(KEY, 1.0, timed(shapes, tp), 0.0).costs
    assert max(noise[Mode.SP] for noise in new.noise.values()) < 0.01
    for phase in ("prefill", "decode"):
        last = max(s.tokens for s in some if s.phase == phase)
        for tokens in {s.tokens for s in shapes if s.phase == phase}:
            curve, before, after = ({m: c.curves[phase][m](tokens) for m in Mode} for c in (new, old.costs, whole))
            if tokens <= last:
                assert curve == pytest.approx(after, rel=0.02), (phase, tokens)
            ratio = (after if tokens <= last else before)[Mode.TP] / (after if tokens <= last else before)[Mode.SP]
            assert curve[Mode.TP] / curve[Mode.SP] == pytest.approx(ratio, rel=0.02), (phase, tokens)
        assert new.attention[phase] == pytest.approx(1e-9, rel=0.2)


def test_a_phase_that_was_not_measured_again_stays():
    shapes = shapes_of()
    old = Calibration.from_measurements(KEY, 1.0, timed(shapes, 1.0), 0.0)
    new = old.with_measurements(1.0, timed([s for s in shapes if s.phase == "decode"], 2.0), None).costs
    assert new.curves["prefill"][Mode.TP] == old.costs.curves["prefill"][Mode.TP]
    assert new.curves["decode"][Mode.TP](1) == pytest.approx(2 * old.costs.curves["decode"][Mode.TP](1), rel=0.01)


def test_without_any_room_the_old_calibration_stays(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mine = make()
    old = mine.start()
    (file,) = tmp_path.iterdir()
    before = file.read_text()
    mine.bench.room = 0
    assert renewed(mine) is None
    assert mine._calibration is old
    assert "no room in the KV pool" in caplog.text
    assert file.read_text() == before


def hinder(scheduler, how):
    if how == "released":
        scheduler.weight_updater.offload_tags.add("weights")
    else:
        scheduler.weight_updater._session = object()


@pytest.mark.parametrize("how", ["released", "updating"])
def test_no_forward_runs_while_memory_is_released_or_weights_are_updated(make, how, caplog):
    caplog.set_level(logging.INFO)
    mine = make()
    mine.start()
    hinder(mine.scheduler, how)
    laps = len(mine.bench.laps)
    for turn in range(5):
        assert mine.idle((turn + 1) * 10**6, drifted=True) is None
    assert len(mine.bench.laps) == laps
    assert mine._measurement_run is None


@pytest.mark.parametrize("how", ["released", "updating"])
def test_a_calibration_that_runs_stops_for_them(make, how, caplog):
    caplog.set_level(logging.INFO)
    mine = make()
    old = mine.start()
    mine.idle(10**6, drifted=True)
    assert mine._measurement_run is not None
    laps = len(mine.bench.laps)
    hinder(mine.scheduler, how)
    assert mine.idle(10**6, drifted=True) is None
    assert mine._measurement_run is None
    assert len(mine.bench.laps) == laps
    assert mine._calibration is old
    assert "stopped calibrating" in caplog.text


def test_a_calibration_waits_while_the_server_is_not_fully_idle(make):
    mine = make()
    mine.start()
    mine.idle(10**6, drifted=True)
    mine.scheduler.idle = False
    laps = len(mine.bench.laps)
    assert mine.idle(10**6, drifted=False) is None
    assert len(mine.bench.laps) == laps
    mine.scheduler.idle = True
    assert renewed(mine) is not None, "it goes on where it was"


def test_a_lap_is_what_a_request_waits_for(make):
    """Large steps: one a turn. What an earlier turn measured counts."""
    mine = make()
    mine.start()
    mine.bench.slow = 100.0  # 100 ms and more
    mine.idle(10**6, drifted=True)
    seen = []
    while mine._measurement_run is not None:
        laps = len(mine.bench.laps)
        mine.idle(10**6, drifted=False)
        seen.append(len(mine.bench.laps) - laps)
    assert max(seen) == 1


def test_a_calibration_that_a_change_of_the_level_stops_begins_anew(make, caplog):
    """The rank may be back at any number of steps. A calibration that was stopped makes the next one no later."""
    caplog.set_level(logging.INFO)
    mine = make()
    old = mine.start()
    mine.idle(2 * DRIFT_STEPS, drifted=True)
    assert mine.measuring
    mine.leave(2 * DRIFT_STEPS)
    assert not mine.measuring and mine.calibration is old and mine.bench.prepared_shape is None
    assert "stopped calibrating, because the instance merges or splits" in caplog.text
    assert mine.idle(1, drifted=True) is None
    assert mine.measuring, "steps count from 0 again"
    while mine.measuring:
        new = mine.idle(1, drifted=False)
    assert new is mine.calibration is not old
    assert mine.idle(4 * DRIFT_STEPS, drifted=True) is None and not mine.measuring
    assert mine.idle(4 * DRIFT_STEPS + 1, drifted=True) is None and mine.measuring


def test_steps_at_a_level_count_together_whatever_comes_between(make):
    mine = make()
    mine.start()
    mine.leave(DRIFT_STEPS)
    mine.idle(DRIFT_STEPS - 1, drifted=True)
    assert not mine.measuring, "too early"
    mine.idle(DRIFT_STEPS, drifted=True)
    assert mine.measuring


def test_the_first_rank_of_an_instance_fits_and_saves_its_calibration(make, tmp_path):
    """At the start, this rank was the second one of the world."""
    mine = make()
    measured = make().start()
    world = SimpleNamespace(
        rank_in_group=1,
        broadcast_object=lambda value, src: value if value is not None else answers.pop(),
        all_gather_object=lambda value: [value, value],
    )
    [file] = tmp_path.iterdir()
    answers = [file, (measured, "text", False)]
    mine._group = world
    assert mine.start() is measured
    mine.measure_in_instance()
    new = renewed(mine)
    assert new.made >= measured.made and new is not measured
    assert msgspec.json.decode(file.read_bytes(), type=Calibration) == new


def test_a_change_of_mode_is_timed(make):
    assert make().start().costs.switch_seconds == pytest.approx(SWITCH)


SGLANG_S = ("SGLANG_USE_1STAGE_ALLREDUCE", "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2", "SGLANG_ENABLE_PCIE_IPC_ALLREDUCE")
OTHERS = ("NCCL_P2P_DISABLE", *SGLANG_S, "flashinfer", "topology", "max_running", "experts")


def test_a_gemm_backend_that_one_mode_does_not_have_everywhere_is_in_the_key():
    """``gemv`` multiplies O and down in SP only."""
    assert "bf16_gemm_backend" in calibration_key.SERVER_ARGS


@pytest.mark.parametrize("name", [*calibration_key.SERVER_ARGS, *OTHERS])
def test_what_changes_step_times_has_a_calibration_of_its_own(make, monkeypatch, tmp_path, name):
    make().start()
    mine = make(replace(CONFIG, experts="replicated") if name == "experts" else CONFIG)
    if name == "flashinfer":
        monkeypatch.setattr(calibration_key, "version", lambda package: "0.0.0")
    elif name == "topology":
        ranks = ["a 18", "b 18"]
        mine.scheduler.tp_group = SimpleNamespace(
            rank_in_group=0, broadcast_object=lambda value, src: value, all_gather_object=lambda value: ranks
        )
    elif name == "max_running":
        mine.scheduler.max_running_requests = 32
    elif name.isupper():
        monkeypatch.setenv(name, "1")
    elif name != "experts":
        others = SimpleNamespace(**{**vars(mine.scheduler.server_args), name: "something else"})
        mine.scheduler.server_args = others
    assert mine.start() is not None
    assert mine.bench.laps, "it was not measured"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_names_of_hosts_do_not_matter():
    assert calibration_key.topology(["x 18", "x 18", "y 4"]) == calibration_key.topology(["a 18", "a 18", "b 4"])
    assert len(set(calibration_key.topology(["x 18", "x 18", "y 18"]))) == 2


def test_a_user_without_a_home_has_a_calibration(monkeypatch):
    """As in a container with a user id that is in no user database."""

    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", calibration.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    file = calibration.cache_file(KEY)
    assert file.is_relative_to(tempfile.gettempdir())
    assert file == calibration.cache_file(KEY)


def test_a_failing_recalibration_keeps_the_old_one(make, caplog):
    caplog.set_level(logging.INFO)
    mine = make()
    mine.start()
    mine.bench.fails = Mode.TP
    assert mine.idle(10**6, drifted=True) is None
    assert mine._measurement_run is None
    assert "the old one stays" in caplog.text


def test_drift():
    drift = Drift()
    for _ in range(DRIFT_STEPS):
        assert drift.ratio(Mode.TP) is None
        drift.add(Mode.TP, 1e-3, 1.2e-3)
    assert drift.ratio(Mode.TP) == pytest.approx(1.2)
    assert not drift.drifted
    for jump in (-5.0, 0.0, math.inf, math.nan, 10**9):
        drift.add(Mode.TP, 1e-3, jump)  # a clock that jumps
    assert drift.ratio(Mode.TP) == pytest.approx(1.2)
    for _ in range(DRIFT_STEPS):
        drift.add(Mode.TP, 1e-3, 2e-3)
    assert drift.drifted
    drift.clear()
    assert not drift.drifted


def agree_on_the_slowest(rank, size):
    import torch.distributed as dist
    from sglang_shift.runtime.calibration_steps import SchedulerBench

    bench = SchedulerBench(SimpleNamespace(tp_cpu_group=dist.group.WORLD))
    assert bench.agree([float(rank), -float(rank)]) == [size - 1.0, 0.0]
    assert math.isinf(bench.agree([math.inf if rank == 1 else 0.5])[0]), "a failure on one rank is known to all"


def test_ranks_agree_on_the_slowest():
    run_ranks(3, agree_on_the_slowest)


class Pool:
    """KV slots of one rank: free ones, and those that a prefix cache holds."""

    def __init__(self, free: int, cached: int, page_size: int = 1) -> None:
        self.page_size = page_size
        self.free, self.cached, self.evictions = free, cached, []

    def available_size(self):
        return self.free

    def evictable_size(self):
        return self.cached

    def evict(self, params):
        self.evictions.append(params.num_tokens)
        self.cached -= params.num_tokens
        self.free += params.num_tokens


def bench_of(rank: int, free: int, cached: int, rows: int = 64, page_size: int = 1):
    import torch.distributed as dist
    from sglang_shift.runtime.calibration_steps import SchedulerBench

    pool = Pool(free, cached, page_size)
    scheduler = SimpleNamespace(
        tp_cpu_group=dist.group.WORLD,
        tp_rank=rank,
        page_size=1,
        max_total_num_tokens=4000,
        max_running_requests=64,
        shift_width=1,
        model_config=SimpleNamespace(context_len=512),
        token_to_kv_pool_allocator=pool,
        tree_cache=pool,
        req_to_token_pool=SimpleNamespace(available_size=lambda: rows),
    )
    return SchedulerBench(scheduler), pool


def shapes_of_unequal_ranks(rank, size):
    """Sessions end by each rank's clock: free slots differ for a while."""
    import torch.distributed as dist
    from sglang_shift.runtime.calibrator import Calibrator

    bench, _ = bench_of(rank, free=700 if rank else 640, cached=0)
    calibrator = Calibrator.__new__(Calibrator)
    calibrator.scheduler, calibrator.bench, calibrator.chunk = bench.scheduler, bench, 512
    shapes = [None] * size
    dist.all_gather_object(shapes, calibrator._agreed_grid())
    assert shapes[0] == shapes[1] == grid(512, 64, 511, 640)
    assert grid(512, 64, 511, 700) != shapes[0], "the ranks would have differed"


def test_ranks_measure_the_same_shapes():
    run_ranks(2, shapes_of_unequal_ranks)


def room_on_unequal_ranks(rank, size):
    bench, pool = bench_of(rank, free=100 + 50 * rank, cached=2000)
    assert bench.make_room(StepShape("prefill", 64, 0, 511))
    assert pool.evictions == [], "there was room"
    assert bench.make_room(StepShape("prefill", 500, 0, 511))
    assert pool.evictions == [402], "what the rank with the fewest free slots lacks, on both"
    assert not bench.make_room(StepShape("prefill", 3000, 0, 511)), "more than a quarter of the pool is not taken"
    assert len(pool.evictions) == 1
    shape = StepShape("decode", 8, 16, 511)
    for free, fits in ((shape.slots + 63, False), (shape.slots + 64, True)):
        shards, _ = bench_of(rank, free=free, cached=0, page_size=4)
        assert shards.make_room(shape) is fits, "with --dcp-size 4, each request begins and ends pages of 4 tokens"
    few, _ = bench_of(rank, free=4000, cached=0, rows=4 if rank else 64)
    assert not few.make_room(StepShape("decode", 8, 16, 511)), "one rank has not enough rows"


def test_ranks_make_room_alike():
    run_ranks(2, room_on_unequal_ranks)


def a_step_that_fails(rank, size, alone):
    import datetime

    import torch
    import torch.distributed as dist
    from sglang_shift.runtime import calibration_steps as module

    module.WAIT = datetime.timedelta(seconds=2)
    group_of_steps = dist.new_group()
    bench, _ = bench_of(rank, free=4000, cached=0)
    bench.prepare = lambda shape: setattr(bench, "prepared_shape", shape)
    bench.release = lambda: setattr(bench, "prepared_shape", None)

    def run(mode, after=None):
        if not alone or rank == 1:
            raise MemoryError("no room")
        dist.all_reduce(torch.ones(1), group=group_of_steps)  # here the other ranks wait for the one that failed
        return 1e-3

    bench.run = run
    with pytest.raises(CalibrationError, match=r"failed while calibrating \(MemoryError"):
        list(measure(bench, [StepShape("prefill", 8, 0, 511)], 60, Results()))


def test_a_step_that_fails_on_all_ranks_ends_the_calibration():
    run_ranks(2, a_step_that_fails, False)


def test_a_step_that_fails_on_one_rank_ends_the_server():
    with pytest.raises(Exception, match=r"failed on rank 1 alone \(MemoryError: no room\)"):
        run_ranks(2, a_step_that_fails, True)


def a_preparation_that_fails_on_one_rank(rank, size):
    bench, _ = bench_of(rank, free=4000, cached=0)

    def prepare(shape):
        if rank == 1:
            raise RuntimeError("no slots")
        bench.prepared_shape = shape

    bench.prepare = prepare
    where = "RuntimeError: no slots" if rank == 1 else "on another rank"
    with pytest.raises(CalibrationError, match=where):
        list(measure(bench, [StepShape("prefill", 8, 0, 511)], 60, Results()))


def test_a_preparation_that_fails_on_one_rank_fails_on_all():
    run_ranks(2, a_preparation_that_fails_on_one_rank)


@pytest.mark.parametrize(("on_gpu", "overlap"), [(False, False), (False, True), (True, False), (True, True)])
def test_a_lap_is_timed_as_serving_runs_it(monkeypatch, on_gpu, overlap):
    """On a GPU with overlap scheduling a step follows another without a wait; all run on the stream of forwards."""
    from contextlib import contextmanager

    import torch
    from sglang_shift.runtime import calibration_steps as module

    done = []

    @contextmanager
    def stream(name):
        done.append(name)
        yield
        done.append("end")

    @contextmanager
    def running_in(mode):
        done.append(mode)
        yield

    laps = iter((1.0, 2.0))

    def forward(batch):
        done.append("forward")
        worker.last_lap = SimpleNamespace(seconds=next(laps))
        return SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=None))

    class Stream(str):
        def wait_stream(self, other):
            done.append("wait")

    worker = SimpleNamespace(
        stopwatch=SimpleNamespace(on_gpu=on_gpu),
        model_runner=SimpleNamespace(running_in=running_in),
        forward_batch_generation=forward,
    )
    scheduler = SimpleNamespace(
        tp_worker=worker,
        is_generation=True,
        enable_overlap=overlap,
        forward_stream=Stream("forward stream"),
        schedule_stream=Stream("schedule stream"),
        device_module=SimpleNamespace(stream=stream, current_stream=lambda: "current"),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    bench = module.SchedulerBench(scheduler)
    bench._batch = SimpleNamespace()
    ahead = on_gpu and overlap
    assert bench.run(Mode.SP) == (2.0 if ahead else 1.0)
    steps = [Mode.SP, "forward"] * (2 if ahead else 1)
    name = "forward stream" if overlap else "schedule stream"
    assert done == ["wait", name, *steps, "end"] + ["synchronize"] * on_gpu
