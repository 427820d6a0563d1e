"""Measures step times: all ranks together run every mode over a grid of step shapes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from statistics import fmean, geometric_mean, median
from typing import Protocol

from sglang_shift.cost.calibration import CalibrationError
from sglang_shift.cost.model import Measurement
from sglang_shift.modes import MODES, Mode

logger = logging.getLogger(__name__)

BUDGET_CPU, BUDGET_GPU = 60.0, 20.0
"""Seconds that a calibration may take."""
CONTEXT, LONG_CONTEXT = 128, 2048
"""Tokens of KV cache that a request has in the shapes with a short and with a long context."""
MAX_DECODE = 512
"""Requests of the largest decode shape."""
SECONDS_A_MODE, MIN_LAPS, MAX_LAPS = 0.4, 2, 9
"""A shape runs in each mode for about this number of seconds, and for these numbers of laps at least and at most."""
SWITCH_TOKENS, SWITCH_LAPS = (1, 8), 5
"""Numbers of tokens of the shapes at which a change of mode is timed, and laps for each pair of modes."""


@dataclass(frozen=True, order=True)
class StepShape:
    """The shape of a step to time.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tokens: Tokens that the step computes.
        context: Prefill: cached tokens before the new tokens. Decode: tokens in the cache of each request.
        longest: Tokens of the longest sequence of the model.
        width: Decode: new tokens of each request. Speculative decoding verifies several.
    """

    phase: str
    tokens: int
    context: int
    longest: int
    width: int = 1

    @property
    def requests(self) -> list[tuple[int, int]]:
        """``[(cached, new), ...]``: the tokens of each request of the step."""
        if self.phase == "decode":
            return [(self.context, self.width)] * (self.tokens // self.width)
        room = self.longest - self.context
        full, rest = divmod(self.tokens, room)
        return [(self.context, room)] * full + ([(self.context, rest)] if rest else [])

    @property
    def slots(self) -> int:
        """KV-cache tokens that the step occupies."""
        return sum(cached + new for cached, new in self.requests)

    @property
    def kv_reads(self) -> int:
        """Query-key pairs, as in :class:`sglang_shift.modes.StepState`."""
        return sum(kv_reads(cached, new) for cached, new in self.requests)


def kv_reads(cached: int, new: int) -> int:
    """Return the query-key pairs of ``new`` tokens after ``cached`` tokens, under the causal mask."""
    return new * cached + new * (new + 1) // 2


def grid(chunk: int, max_requests: int, longest: int, slots: int, width: int = 1) -> list[StepShape]:
    """Return the shapes of a calibration, from small to large.

    They are prefills of 1 token to a chunk, and decodes of 1 request to the most requests, by powers of two. Some
    shapes of each phase have a long context. The cost of attention follows from these shapes.

    Args:
        chunk: Prompt tokens of the largest step.
        max_requests: Requests of the largest decode step.
        longest: Tokens of the longest sequence of the model.
        slots: KV-cache tokens that the shapes may occupy.
        width: New tokens of each request in a decode step.
    """
    longest = min(longest, slots)
    short, long = min(CONTEXT, longest // 2), min(LONG_CONTEXT, longest // 2)
    shapes = [StepShape("prefill", n, 0, longest) for n in powers(min(chunk, slots))]
    shapes += [StepShape("prefill", n, long, longest) for n in powers(min(chunk, longest - long))[-3::2]]
    most = min(max_requests, MAX_DECODE, max(1, slots // (short + width)))
    shapes += [StepShape("decode", n * width, short, longest, width) for n in powers(most)]
    shapes += [
        StepShape("decode", n * width, long, longest, width) for n in powers(most)[::3] if n * (long + width) <= slots
    ]
    return sorted({s for s in shapes if s.slots <= slots}, key=lambda s: (s.tokens * (s.context + 64), s))


def powers(last: int) -> list[int]:
    """Return 1, 2, 4, ... and ``last``."""
    return [2**i for i in range(last.bit_length()) if 2**i < last] + [last]


class Bench(Protocol):
    """Runs steps of a shape. ``runtime.calibration_steps`` has the bench of a server."""

    prepared_shape: StepShape | None
    """The shape whose steps can run now."""

    def make_room(self, shape: StepShape) -> bool:
        """Return whether ``shape`` fits into the KV pool. Prefixes in the cache may be evicted to make room.

        This call is collective, and its answer is the same on every rank.
        """

    def prepare(self, shape: StepShape) -> None:
        """Allocate the memory for steps of ``shape``. This call is not collective: it may fail on one rank alone."""

    def run(self, mode: Mode, after: Mode | None = None) -> float:
        """Run one step of the prepared shape, as serving would, and return its seconds. This call is collective.

        Args:
            mode: The mode of the step.
            after: The mode of another step, which runs just before and is not timed. None if its mode does not matter.
        """

    def release(self) -> None:
        """Free the memory of :meth:`prepare`, if it allocated any."""

    def agree(self, numbers: Sequence[float], failure: str = "") -> list[float]:
        """Return the largest value of each number over all ranks. This call is collective.

        Args:
            numbers: The numbers of this rank.
            failure: What failed on this rank, or an empty string. After a failure, other ranks may never call this.

        Raises:
            ShiftError: after a failure, the other ranks did not answer in time.
        """


@dataclass
class Results:
    """The results of :func:`measure` so far; the same on every rank.

    Attributes:
        steps: Step times.
        switches: How many seconds longer a step took after a step in another mode than after a step in its own mode.
        seconds: Seconds that the measurement took on the slowest rank.
        progress: Share of the shapes that is done, up to 1.
    """

    steps: list[Measurement] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    seconds: float = 0.0
    progress: float = 0.0


class NoRoomError(Exception):
    """A shape does not fit on any rank, because its memory was taken while the bench was released."""


def measure(
    bench: Bench,
    shapes: Sequence[StepShape],
    budget: float,
    results: Results,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[None, None, None]:
    """Time all shapes in every mode. This is a generator, which yields after each lap.

    A serving scheduler runs a few laps at a time, and releases the bench in between. All ranks do the same, because
    every decision follows from numbers that the ranks have agreed on. The modes take turns. So if a machine is slower
    for a while, it is slower for all modes.

    Args:
        bench: Runs the steps.
        shapes: The shapes from small to large; the same on every rank.
        budget: Seconds. Shapes that would exceed the budget are left out, except the first shape of each phase.
        results: The results are added to it.
        clock: Returns monotonic seconds.

    Raises:
        CalibrationError: a step failed on every rank, or some rank could not prepare a step.
        ShiftError: a step failed on this rank alone.
    """
    last_shapes: dict[str, tuple[int, float]] = {}
    for done, shape in enumerate(shapes, 1):
        tokens, took = last_shapes.get(shape.phase, (shape.tokens, 0.0))
        affordable = (
            results.seconds + took * max(1.0, shape.tokens / tokens) <= budget or shape.phase not in last_shapes
        )
        if affordable:
            started = results.seconds
            try:
                times = yield from _take_turns(Laps(bench, shape, results, clock))
                if shape.tokens in SWITCH_TOKENS and max(times.values()) < SECONDS_A_MODE:
                    results.switches.append((yield from _switch(Laps(bench, shape, results, clock))))
                for mode, seconds in times.items():
                    results.steps.append(Measurement(shape.phase, mode, shape.tokens, shape.kv_reads, seconds))
                last_shapes[shape.phase] = shape.tokens, results.seconds - started
            except NoRoomError:
                logger.debug("no room for %s", shape)
            finally:
                bench.release()
        results.progress = done / len(shapes)


@dataclass
class Laps:
    """Runs laps of one shape."""

    bench: Bench
    shape: StepShape
    results: Results
    clock: Callable[[], float]

    def run(self, mode: Mode, after: Mode | None = None) -> Generator[None, None, float]:
        """Run one lap, and return its seconds as agreed. Prepare the shape first if the bench was released."""
        started = self.clock()
        if self.bench.prepared_shape is not self.shape:
            self._prepare()
        seconds, failure = math.inf, ""
        try:
            seconds = self.bench.run(mode, after)
        except Exception as error:  # for example out of memory, or a kernel that does not support the shape
            failure = _error_text(error)
        seconds, took = self.bench.agree([seconds, self.clock() - started], failure)
        if math.isinf(seconds):
            where = failure or "on another rank"
            raise CalibrationError(f"a step in {mode.name} failed while calibrating ({where})", mode)
        self.results.seconds += took
        yield
        return seconds

    def _prepare(self) -> None:
        if not self.bench.make_room(self.shape):
            raise NoRoomError
        failure = ""
        try:
            self.bench.prepare(self.shape)
        except Exception as error:
            failure = _error_text(error)
        if self.bench.agree([float(bool(failure))])[0]:
            raise CalibrationError(f"a step could not be prepared for calibrating ({failure or 'on another rank'})")


def _take_turns(laps: Laps) -> Generator[None, None, dict[Mode, float]]:
    """Run rounds of laps, and return the seconds of each mode as agreed.

    The rounds give medians of two quantities: the modes' mean, and the ratio of each mode to the first mode. The result
    is made of these medians. The first lap of each mode is a warm-up, and decides how many rounds there is time for.
    """
    warm_up = yield from _round(laps)
    count = max(MIN_LAPS, min(MAX_LAPS, int(SECONDS_A_MODE / max(*warm_up.values(), 1e-6))))
    rounds = []
    for _ in range(count):
        rounds.append((yield from _round(laps)))
    mean = median(geometric_mean(times.values()) for times in rounds)
    ratios = {mode: median(times[mode] / times[MODES[0]] for times in rounds) for mode in MODES}
    shared = geometric_mean(ratios.values())
    return {mode: mean * ratio / shared for mode, ratio in ratios.items()}


def _round(laps: Laps) -> Generator[None, None, dict[Mode, float]]:
    """Run one lap in each mode."""
    times = {}
    for mode in MODES:
        times[mode] = yield from laps.run(mode)
    return times


def _switch(laps: Laps) -> Generator[None, None, float]:
    """Return how many seconds longer a step takes after a step in another mode.

    The result is the mean over all pairs of modes; each pair contributes its median.
    """
    differences_by_pair: dict[tuple[Mode, Mode], list[float]] = {pair: [] for pair in permutations(MODES, 2)}
    for _ in range(SWITCH_LAPS):
        for (mode, before), differences in differences_by_pair.items():
            switched = yield from laps.run(mode, after=before)
            stayed = yield from laps.run(mode, after=mode)
            differences.append(switched - stayed)
    return fmean(median(differences) for differences in differences_by_pair.values())


def _error_text(error: Exception) -> str:
    logger.debug("a calibration step failed", exc_info=True)
    return f"{type(error).__name__}: {error}"
