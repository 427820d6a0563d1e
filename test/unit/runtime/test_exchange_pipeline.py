"""Which steps are pipelined, and how a calibration finds where this is faster."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.config import ShiftConfig
from sglang_shift.cost import calibration
from sglang_shift.cost.calibration import load
from sglang_shift.cost.compare_exchanges import MAX_ROUNDS, MIN_ROUNDS, compare_exchanges
from sglang_shift.cost.exchange_gain import MIN_GAIN, ExchangeGain, first_tokens
from sglang_shift.cost.measure import StepShape, measure
from sglang_shift.models.heads import Heads
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange.head_groups import HeadGroups
from sglang_shift.runtime import calibration_key, calibrator
from sglang_shift.runtime.exchange_pipeline import ExchangePipeline
from test_calibrator import FakeBench, FakeScheduler, measured, shapes_of

GROUPS = HeadGroups.of(Heads(8, 1), 64)
EXTENDS = (ForwardMode.EXTEND, ForwardMode.MIXED)


def batch(mode: ForwardMode, tokens: int) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=mode, extend_num_tokens=tokens)


@pytest.mark.parametrize("mode", list(ForwardMode))
def test_prefills_are_pipelined_and_no_other_step(mode):
    pipeline = ExchangePipeline(GROUPS, 100)
    assert pipeline.applies_to(batch(mode, 100)) is (mode in EXTENDS)
    assert not pipeline.applies_to(batch(mode, 99))


def test_without_groups_or_a_number_no_step_is():
    for pipeline in (ExchangePipeline(), ExchangePipeline(GROUPS), ExchangePipeline(None, 1)):
        assert not pipeline.applies_to(batch(ForwardMode.EXTEND, 10**6))
        assert pipeline.text == "no step exchanges its heads group by group"
    assert ExchangePipeline(GROUPS).possible and not ExchangePipeline().possible


def test_a_number_for_a_while():
    pipeline = ExchangePipeline(GROUPS, 512)
    with pytest.raises(ZeroDivisionError), pipeline.starting_at(1):
        assert pipeline.applies_to(batch(ForwardMode.EXTEND, 1))
        raise ZeroDivisionError
    assert pipeline.report() == {"groups": 4, "first_tokens": 512, "steps": 0}
    assert pipeline.text == "prefills of 512 tokens or more exchange their heads in 4 groups"


def gain(tokens: int, gain: float, error: float = 0.0) -> ExchangeGain:
    return ExchangeGain(tokens, 1.0, gain, error)


@pytest.mark.parametrize(
    ("gains", "first"),
    [
        ([], None),
        ([gain(2048, -0.1)], None),
        ([gain(2048, 0.9 * MIN_GAIN)], None),
        ([gain(2048, 0.1, error=0.06)], None),  # within the noise
        ([gain(2048, 0.1, error=0.04)], 2048),
        ([gain(512, 0.1), gain(1024, -0.1), gain(2048, 0.1)], 2048),
        ([gain(2048, 0.1), gain(1024, 0.1), gain(512, 0.0)], 1024),
        ([gain(2048, -0.1), gain(1024, 0.1)], None),  # the largest decides
    ],
)
def test_where_it_wins(gains, first):
    assert first_tokens(gains) == first


class PipelinedBench(FakeBench):
    """A machine on which the pipeline hides 20 % of a step, and costs 1 ms: it wins above 260 tokens or so."""

    def __init__(self, scheduler=None, cost: float = 1e-3, fails_pipelined: bool = False, **options) -> None:
        super().__init__(scheduler, **options)
        self.cost, self.fails_pipelined, self.pipelined = cost, fails_pipelined, False
        self.ways: list[tuple[Mode, bool]] = []

    @contextmanager
    def way(self, pipelined: bool):
        before, self.pipelined = self.pipelined, pipelined
        yield
        self.pipelined = before

    def run(self, mode, after=None):
        pipelined = self.pipelined and mode is Mode.SP
        if pipelined and self.fails_pipelined:
            raise MemoryError("no room")
        self.ways.append((mode, pipelined))
        took = super().run(mode, after)
        return 0.8 * took + self.cost if pipelined else took


def compared(bench: PipelinedBench, shapes: list[StepShape]) -> list[ExchangeGain]:
    gains: list[ExchangeGain] = []
    for _ in compare_exchanges(bench, shapes, bench.way, gains, lambda: bench.now):
        pass
    assert bench.prepared_shape is None, "its slots were given back"
    return gains


def test_both_ways_take_turns_from_small_to_large():
    bench = PipelinedBench()
    gains = compared(bench, shapes_of(512))
    assert [gain.tokens for gain in gains] == [64, 128, 256, 512]
    assert [gain.wins for gain in gains] == [False, False, False, True]
    assert first_tokens(gains) == 512
    assert bench.ways == [(Mode.SP, False), (Mode.SP, True)] * (len(bench.ways) // 2)
    assert all(not shape.context and shape.phase == "prefill" for shape, _ in bench.laps)
    assert len(bench.ways) == 2 * 4 * (MAX_ROUNDS + 1)


def test_it_wins_nowhere_if_it_costs_more():
    assert first_tokens(compared(PipelinedBench(cost=1.0), shapes_of(512))) is None


def test_slow_steps_have_few_rounds_and_the_budget_leaves_out_the_largest():
    bench = PipelinedBench(slow=1000.0)
    gains = compared(bench, shapes_of(512))
    assert 0 < len(gains) < 4 and bench.now < 90
    assert len(bench.ways) == 2 * len(gains) * (MIN_ROUNDS + 1)


def test_a_shape_without_room_is_left_out():
    assert [gain.tokens for gain in compared(PipelinedBench(room=300), shapes_of(512))] == [64, 128, 256]


CONFIG = ShiftConfig(2, 2, True, "calibrated", calibration="auto", exchange_pipeline="auto")


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A calibrator on a machine with a pipeline, whose cache is ``tmp_path``."""
    monkeypatch.setenv(calibration.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration_key, "get_schedule", lambda: SimpleNamespace(page_size=1))
    monkeypatch.setattr(
        calibration_key, "resolution_result", lambda args, name, default=None: vars(args).get(name, default)
    )

    def build(config=CONFIG, **bench):
        pipeline = ExchangePipeline(GROUPS)
        mine = PipelinedBench(**bench)
        # The bench of a server asks the rule for each step.
        monkeypatch.setattr(PipelinedBench, "pipelined", property(lambda bench: pipeline.applies_to(
            batch(ForwardMode.EXTEND if bench.prepared_shape.phase == "prefill" else ForwardMode.DECODE,
                  bench.prepared_shape.tokens)), lambda bench, value: None), raising=False)  # fmt: skip
        runner = SimpleNamespace(
            **vars(FakeScheduler.tp_worker.model_runner) | {
                "topology": SimpleNamespace(exchange=SimpleNamespace(text="collective")),
                "exchange_pipeline": pipeline,
            }
        )  # fmt: skip
        scheduler = FakeScheduler()
        scheduler.tp_worker = SimpleNamespace(model_runner=runner)
        scheduler.server_args = SimpleNamespace(shift_exchange_pipeline=config.exchange_pipeline)
        monkeypatch.setattr(calibrator, "SchedulerBench", lambda scheduler: mine)
        monkeypatch.setattr(calibrator, "measure", lambda fake, *args: measure(fake, *args, clock=lambda: fake.now))
        monkeypatch.setattr(
            calibrator, "compare_exchanges", lambda *args: compare_exchanges(*args, clock=lambda: mine.now)
        )
        return calibrator.Calibrator(scheduler, config, 512), pipeline

    return build


def test_a_calibration_times_it_first_and_remembers(make, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, pipeline = make()
    calibrated = first.start()
    assert pipeline.first_tokens == calibrated.pipelined_from == 512
    assert "By the calibration, prefills of 512 tokens or more exchange their heads in 4 groups." in caplog.text
    # The curve of SP has the time of the way that is taken.
    sp = calibrated.costs.curves["prefill"][Mode.SP]
    assert sp(512) < 0.97 * measured().costs.curves["prefill"][Mode.SP](512)
    assert sp(128) == pytest.approx(measured().costs.curves["prefill"][Mode.SP](128), rel=0.05)
    second, again = make()
    assert second.start().exchange_gains == calibrated.exchange_gains
    assert again.first_tokens == 512 and not second.bench.laps, "nothing was measured"
    (file,) = tmp_path.iterdir()
    assert load(file, calibrated.key).pipelined_from == 512


def test_a_renewed_calibration_keeps_it(make):
    mine, pipeline = make()
    old = mine.start()
    new = old.with_measurements(1.0, old.measurements, None)
    assert new.exchange_gains == old.exchange_gains and pipeline.first_tokens == 512


def test_without_auto_it_is_not_timed(make):
    for value in ("off", "on"):
        mine, pipeline = make(replace(CONFIG, exchange_pipeline=value))
        assert mine.start().exchange_gains == ()
        assert pipeline.first_tokens is None, "the calibration leaves the rule alone"


def test_each_value_has_times_of_its_own(make, tmp_path):
    for value in ("auto", "on"):
        make(replace(CONFIG, exchange_pipeline=value))[0].start()
    assert len(list(tmp_path.iterdir())) == 2


def test_if_it_fails_the_ordinary_exchange_is_calibrated(make, caplog):
    mine, pipeline = make(fails_pipelined=True)
    calibrated = mine.start()
    assert calibrated is not None and mine.failed_mode is None
    assert pipeline.first_tokens is None and calibrated.pipelined_from is None
    assert "the exchange is not pipelined: a step in SP failed while calibrating" in caplog.text
