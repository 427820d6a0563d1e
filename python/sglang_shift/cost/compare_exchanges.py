"""Measures whether SP prefills are faster if they exchange their heads group by group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from statistics import median

from sglang_shift.cost.exchange_gain import ExchangeGain
from sglang_shift.cost.measure import Bench, Laps, NoRoomError, Results, StepShape
from sglang_shift.modes import Mode

SECONDS_A_SHAPE, MIN_ROUNDS, MAX_ROUNDS = 8.0, 3, 9
"""A shape runs in both ways for about this number of seconds, and for these numbers of rounds at least and at most."""
SHAPES = 4
"""The most shapes: the largest ones."""
BUDGET = 40.0
"""Seconds of a comparison. Shapes that would exceed the budget are left out, except the first one."""

Pipelined = Callable[[bool], AbstractContextManager[None]]
"""Returns a context in which all SP prefills are pipelined, or no step is."""


def compare_exchanges(
    bench: Bench,
    shapes: Sequence[StepShape],
    pipelined: Pipelined,
    gains: list[ExchangeGain],
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[None, None, None]:
    """Time SP prefills in both ways, which take turns.

    This is a generator, which yields after each lap. All ranks run it together, and take the same branches.

    Args:
        bench: Runs the steps.
        shapes: The shapes of a calibration. Its prefills without a cached prefix count.
        pipelined: Chooses the way.
        gains: The results are added to it.
        clock: Returns monotonic seconds.

    Raises:
        CalibrationError, ShiftError: as :func:`~sglang_shift.cost.measure.measure`.
    """
    prefills = sorted((s for s in shapes if s.phase == "prefill" and not s.context), key=lambda s: s.tokens)
    results, took = Results(), 0.0  # seconds of all shapes, and seconds for each token of the last shape
    for shape in prefills[-SHAPES:]:
        started = results.seconds
        if started + took * shape.tokens > BUDGET:
            break
        try:
            gains.append((yield from _gain(Laps(bench, shape, results, clock), pipelined)))
        except NoRoomError:
            continue
        finally:
            bench.release()
        took = (results.seconds - started) / shape.tokens


def _gain(laps: Laps, pipelined: Pipelined) -> Generator[None, None, ExchangeGain]:
    def run_both() -> Generator[None, None, tuple[float, float]]:
        with pipelined(False):
            ordinary = yield from laps.run(Mode.SP)
        with pipelined(True):
            return ordinary, (yield from laps.run(Mode.SP))

    warm_up = yield from run_both()
    count = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS_A_SHAPE / max(sum(warm_up), 1e-6))))
    rounds = []
    for _ in range(count):
        rounds.append((yield from run_both()))
    ratios = [math.log(ordinary / other) for ordinary, other in rounds]
    gain = median(ratios)
    error = 1.4826 * median(abs(ratio - gain) for ratio in ratios) / math.sqrt(count)
    return ExchangeGain(laps.shape.tokens, median(ordinary for ordinary, _ in rounds), gain, error)
