"""Measuring step times, keeping them, and what happens when that goes wrong."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from harness import run_ranks
from sglang_shift import calibration, calibrator
from sglang_shift.calibration import Calibration, CalibrationError, load, save
from sglang_shift.config import ShiftConfig
from sglang_shift.cost_model import Measurement
from sglang_shift.measuring import MAX_LAPS, Measured, Shape, grid, kv_reads, measure, powers
from sglang_shift.modes import Mode
from sglang_shift.selector import DRIFT_STEPS, Drift

KEY = {"architecture": "X", "tp_size": 2}
CONFIG = ShiftConfig(2, 2, True, "calibrated", calibration="auto")


def seconds(mode: Mode, shape: Shape) -> float:
    """A machine on which TP is faster up to 99 tokens."""
    base, slope = (1e-3, 2e-5) if mode is Mode.TP else (2e-3, 1e-5)
    return base + slope * shape.tokens + 1e-9 * shape.kv_reads


class FakeBench:
    """Runs shapes in no time; knows what it was asked."""

    def __init__(self, scheduler=None, fails: Mode | None = None, slow: float = 1.0) -> None:
        self.fails, self.slow = fails, slow
        self.now, self.held, self.laps = 0.0, None, []

    def prepare(self, shape):
        assert self.held is None, "the shape before was not released"
        self.held = shape

        def run(mode):
            if mode is self.fails:
                raise MemoryError("no room")
            took = self.slow * seconds(mode, shape)
            self.now += took
            self.laps.append((shape, mode))
            return took

        return run

    def release(self):
        self.held = None

    def fits(self, shape):
        return shape.slots <= 100_000

    def agree(self, numbers):
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
    shape = Shape("prefill", 1000, 0, 300)
    assert shape.requests == [(0, 300), (0, 300), (0, 300), (0, 100)]
    assert shape.kv_reads == 3 * 300 * 301 // 2 + 100 * 101 // 2


def test_kv_reads_by_brute_force():
    for cached, new in ((0, 1), (0, 7), (5, 3), (100, 1)):
        assert kv_reads(cached, new) == sum(cached + i + 1 for i in range(new))


def test_powers():
    assert powers(1) == [1]
    assert powers(8) == [1, 2, 4, 8]
    assert powers(12) == [1, 2, 4, 8, 12]


def test_measuring_finds_the_crossover():
    bench, found = FakeBench(), Measured()
    parts = list(measure(bench, shapes_of(), 60, found, clock=lambda: bench.now))
    assert parts == sorted(parts)
    assert parts[-1] == 1
    costs = Calibration.of(KEY, found.seconds, found.steps, 0.0).costs
    assert costs.crossovers("decode")[0] == (1, Mode.TP)
    (start, _), (crossover, mode) = costs.crossovers("prefill")
    assert (start, mode) == (1, Mode.SP)
    assert 95 < crossover < 105
    assert bench.held is None


def test_modes_take_turns():
    bench = FakeBench()
    list(measure(bench, [Shape("prefill", 64, 0, 4095)], 60, Measured(), clock=lambda: bench.now))
    modes = [mode for _, mode in bench.laps]
    assert modes == [Mode.TP, Mode.SP] * (len(modes) // 2)
    assert 2 * 4 <= len(modes) <= 2 * (MAX_LAPS + 1)


def test_the_budget_leaves_out_large_shapes_but_never_a_phase():
    bench, found = FakeBench(slow=1000.0), Measured()
    list(measure(bench, shapes_of(), 30, found, clock=lambda: bench.now))
    assert found.seconds < 60
    assert {(m.phase, m.mode) for m in found.steps} == {(p, m) for p in ("prefill", "decode") for m in Mode}
    assert max(m.tokens for m in found.steps) < 512


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_that_fails_is_named(mode):
    bench = FakeBench(fails=mode)
    with pytest.raises(CalibrationError, match=f"{mode.value.upper()} failed.*no room") as error:
        list(measure(bench, shapes_of(), 60, Measured()))
    assert error.value.broken is mode
    assert bench.held is None, "its slots were given back"


def measured() -> Calibration:
    bench, found = FakeBench(), Measured()
    list(measure(bench, shapes_of(), 60, found, clock=lambda: bench.now))
    return Calibration.of(KEY, found.seconds, found.steps, 1e-5)


def test_saved_and_loaded(tmp_path):
    file = tmp_path / "folder" / "c.json"
    save(file, measured())
    again = load(file, KEY)
    assert again.to_json() == measured().to_json() | {"made": again.made}
    assert [p.name for p in file.parent.iterdir()] == ["c.json"], "no temporary file is left"


def test_a_foreign_calibration_says_what_differs(tmp_path):
    save(tmp_path / "c.json", measured())
    with pytest.raises(CalibrationError, match="made for something else: tp_size is 2 there and 4 here"):
        load(tmp_path / "c.json", {**KEY, "tp_size": 4})


def broken_files():
    good = measured().to_json()
    return {
        "not JSON": "{",
        "a list": "[]",
        "another format": json.dumps({**good, "format": 99}),
        "no costs": json.dumps({k: v for k, v in good.items() if k != "costs"}),
        "negative times": json.dumps(good).replace('"seconds": [0.', '"seconds": [-0.'),
        "not a number": json.dumps(good).replace('"switch_seconds": 1e-05', '"switch_seconds": NaN'),
        "a curve that falls": json.dumps(
            {**good, "costs": {**good["costs"], "curves": {k: {**c, "seconds": [*c["seconds"][:-1], 1e-9]}
                                                          for k, c in good["costs"]["curves"].items()}}}
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
        Calibration.of(KEY, 1.0, [Measurement("prefill", Mode.TP, 1, 1, 0.1)], 0.0)


class FakeScheduler:
    """What a Calibrator asks of the scheduler; one rank."""

    max_running_requests = 64
    tp_group = SimpleNamespace(broadcast_object=lambda value, src: value)
    model_config = SimpleNamespace(
        context_len=4096,
        dtype="float32",
        hf_config=SimpleNamespace(architectures=["X"], to_dict=lambda: {"hidden_size": 8}),
    )
    req_to_token_pool = SimpleNamespace(available_size=lambda: 64)
    token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 20_000)
    tp_worker = SimpleNamespace(
        model_runner=SimpleNamespace(
            attn_backend=object(), kv_cache_dtype="float32", graphs=SimpleNamespace(captured=dict)
        )
    )


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A calibrator on a fake bench, whose cache is ``tmp_path``."""
    monkeypatch.setenv(calibration.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibrator, "get_parallel", lambda: SimpleNamespace(tp_rank=0, nnodes=1))
    monkeypatch.setattr(calibrator, "get_schedule", lambda: SimpleNamespace(page_size=1))

    def build(config=CONFIG, **bench):
        monkeypatch.setattr(calibrator, "SchedulerBench", lambda scheduler: FakeBench(**bench))
        return calibrator.Calibrator(FakeScheduler(), config, 512)

    return build


def test_the_first_start_measures_and_the_second_reuses(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = make()
    assert first.start() is not None
    (file,) = tmp_path.iterdir()
    assert "saved as" in first.text
    second = make()
    assert second.start().to_json() == json.loads(file.read_text())
    assert str(file) in second.text
    assert not second.bench.laps, "nothing was measured"


def test_another_exchange_has_times_of_its_own(make, tmp_path):
    make().start()
    other = make(replace(CONFIG, exchange_dtype="fp8"))
    assert other.start() is not None and other.bench.laps
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_cache_is_measured_again(make, tmp_path, caplog):
    make().start()
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert make().start() is not None
    assert "cannot be read" in caplog.text
    json.loads(file.read_text())


def test_a_file_of_the_users_is_written_if_it_does_not_exist(make, tmp_path):
    config = replace(CONFIG, calibration=str(tmp_path / "mine.json"))
    assert make(config).start() is not None
    assert make(config).start() is not None
    assert [f.name for f in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize("content", ["{", "foreign"])
def test_a_file_of_the_users_that_does_not_fit_is_left_alone(make, tmp_path, content, caplog):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(measured().to_json()) if content == "foreign" else content)
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
    assert mine.broken is Mode.SP
    assert "SP failed" in caplog.text
    assert not list(tmp_path.iterdir())


def test_drift_is_followed_by_a_new_calibration_while_idle(make):
    mine = make()
    old = mine.start()
    assert mine.idle(10, drifted=True) is None, "too early"
    assert mine.idle(2 * DRIFT_STEPS, drifted=False) is None
    assert mine._running is None
    mine.bench.slow = 2.0
    steps, new, turns = 4 * DRIFT_STEPS, None, 0
    while new is None and turns < 1000:
        laps = len(mine.bench.laps)
        new = mine.idle(steps, drifted=turns == 0)
        assert len({shape for shape, _ in mine.bench.laps[laps:]}) <= 1, "more than one shape in an idle turn"
        turns += 1
    assert new.costs.curves["decode", Mode.TP](8) == pytest.approx(2 * old.costs.curves["decode", Mode.TP](8))
    assert mine.idle(steps + 2 * DRIFT_STEPS, drifted=True) is None
    assert mine._running is None, "the next look at drift is later than the first was"


def test_a_failing_recalibration_keeps_the_old_one(make, caplog):
    caplog.set_level(logging.INFO)
    mine = make()
    mine.start()
    mine.bench.fails = Mode.TP
    assert mine.idle(10**6, drifted=True) is None
    assert mine._running is None
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
    from sglang_shift.bench import SchedulerBench

    bench = SchedulerBench(SimpleNamespace(tp_cpu_group=dist.group.WORLD))
    assert bench.agree([float(rank), -float(rank)]) == [size - 1.0, 0.0]
    assert math.isinf(bench.agree([math.inf if rank == 1 else 0.5])[0]), "a failure on one rank is known to all"


def test_ranks_agree_on_the_slowest():
    run_ranks(3, agree_on_the_slowest)
