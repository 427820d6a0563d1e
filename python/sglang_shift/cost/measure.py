"""Measuring step times: every mode over a grid of step shapes, on all ranks together."""

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
"""Tokens of KV cache that a request of a decode shape has."""
MAX_DECODE = 512
"""Requests of the largest decode shape."""
SECONDS_A_MODE, MIN_LAPS, MAX_LAPS = 0.4, 2, 9
"""How long and how often a shape is timed in one mode."""
SWITCH_TOKENS, SWITCH_LAPS = (1, 8), 5
"""Tokens of the shapes at which a change of mode is timed, and how often in each mode."""


@dataclass(frozen=True, order=True)
class StepShape:
    """A step to time.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tokens: Tokens it computes.
        context: Prefill: cached tokens before the new ones. Decode: tokens in the cache of each request.
        longest: Longest sequence of the model.
    """

    phase: str
    tokens: int
    context: int
    longest: int

    @property
    def requests(self) -> list[tuple[int, int]]:
        """``[(cached, new), ...]`` tokens of each of its requests."""
        if self.phase == "decode":
            return [(self.context, 1)] * self.tokens
        room = self.longest - self.context
        full, rest = divmod(self.tokens, room)
        return [(self.context, room)] * full + ([(self.context, rest)] if rest else [])

    @property
    def slots(self) -> int:
        """KV-cache tokens it takes."""
        return sum(cached + new for cached, new in self.requests)

    @property
    def kv_reads(self) -> int:
        """As in :class:`sglang_shift.modes.StepState`."""
        return sum(kv_reads(cached, new) for cached, new in self.requests)


def kv_reads(cached: int, new: int) -> int:
    """Query-key pairs of ``new`` tokens after ``cached`` ones, under the causal mask."""
    return new * cached + new * (new + 1) // 2


def grid(chunk: int, max_requests: int, longest: int, slots: int) -> list[StepShape]:
    """The shapes of a calibration, from small to large.

    Prefills of 1 token to a chunk and decode batches of 1 to the most requests, by powers of two;
    some of each at a long context, from which the cost of attention follows.

    Args:
        chunk: Prompt tokens of the largest step.
        max_requests: Requests of the largest decode step.
        longest: Longest sequence of the model.
        slots: KV-cache tokens that may be used.
    """
    longest = min(longest, slots)
    short, long = min(CONTEXT, longest // 2), min(LONG_CONTEXT, longest // 2)
    shapes = [StepShape("prefill", n, 0, longest) for n in powers(min(chunk, slots))]
    shapes += [StepShape("prefill", n, long, longest) for n in powers(min(chunk, longest - long))[-3::2]]
    most = min(max_requests, MAX_DECODE, max(1, slots // (short + 1)))
    shapes += [StepShape("decode", n, short, longest) for n in powers(most)]
    shapes += [StepShape("decode", n, long, longest) for n in powers(most)[::3] if n * (long + 1) <= slots]
    return sorted({s for s in shapes if s.slots <= slots}, key=lambda s: (s.tokens * (s.context + 64), s))


def powers(last: int) -> list[int]:
    """1, 2, 4, ... and ``last``."""
    return [2**i for i in range(last.bit_length()) if 2**i < last] + [last]


class Bench(Protocol):
    """Something that runs steps of a shape; ``runtime.calibration_steps`` has the one of a server."""

    prepared: StepShape | None
    """The shape whose steps can run now."""

    def make_room(self, shape: StepShape) -> bool:
        """Whether ``shape`` fits into the KV pool, for which others may have to leave it. Collective.

        The answer is the same on every rank.
        """

    def prepare(self, shape: StepShape) -> None:
        """Take what steps of ``shape`` need. Not collective: it may fail on one rank alone."""

    def run(self, mode: Mode, after: Mode | None = None) -> float:
        """Run one step of what was prepared, as serving would, and return its seconds. Collective.

        Args:
            mode: Its mode.
            after: The mode of a step that is run just before it and not timed; None where it does not matter.
        """

    def release(self) -> None:
        """Give back what :meth:`prepare` took, if anything."""

    def agree(self, numbers: Sequence[float], failure: str = "") -> list[float]:
        """The largest of each number over all ranks. Collective.

        Args:
            numbers: This rank's.
            failure: What failed on this rank, if anything did. Then the other ranks may never get here.

        Raises:
            ShiftError: after a failure, the other ranks did not answer in time.
        """


@dataclass
class Measured:
    """What :func:`measure` found so far; the same on every rank.

    Attributes:
        steps: Step times.
        switches: What a step after one of another mode took beyond one after its own mode, in seconds.
        seconds: What it all took, on the slowest rank.
        part: The part of the shapes that is done, up to 1.
    """

    steps: list[Measurement] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    seconds: float = 0.0
    part: float = 0.0


class _NoRoomError(Exception):
    """A shape does not fit, on any rank: what it needed was taken while the bench was released."""


def measure(
    bench: Bench,
    shapes: Sequence[StepShape],
    budget: float,
    found: Measured,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[None, None, None]:
    """Time all shapes in every mode; a generator that yields after each lap.

    A serving scheduler does a few laps at a time, and releases the bench in between. All ranks do the
    same: every decision follows from numbers that they have agreed on. The modes take turns, so that a
    machine that is slower for a while is so for all.

    Args:
        bench: What runs the steps.
        shapes: From small to large; the same on every rank.
        budget: Seconds; shapes that would exceed it are left out, but for the first of each phase.
        found: Is added to.
        clock: Monotonic seconds.

    Raises:
        CalibrationError: a step failed on every rank, or could not be prepared on some.
        ShiftError: a step failed on this rank alone.
    """
    before: dict[str, tuple[int, float]] = {}
    for done, shape in enumerate(shapes, 1):
        tokens, took = before.get(shape.phase, (shape.tokens, 0.0))
        affordable = found.seconds + took * max(1.0, shape.tokens / tokens) <= budget or shape.phase not in before
        if affordable:
            started = found.seconds
            try:
                times = yield from _take_turns(_Laps(bench, shape, found, clock))
                if shape.tokens in SWITCH_TOKENS and max(times.values()) < SECONDS_A_MODE:
                    found.switches.append((yield from _switch(_Laps(bench, shape, found, clock))))
                for mode, seconds in times.items():
                    found.steps.append(Measurement(shape.phase, mode, shape.tokens, shape.kv_reads, seconds))
                before[shape.phase] = shape.tokens, found.seconds - started
            except _NoRoomError:
                logger.debug("no room for %s", shape)
            finally:
                bench.release()
        found.part = done / len(shapes)


@dataclass
class _Laps:
    """Runs laps of one shape."""

    bench: Bench
    shape: StepShape
    found: Measured
    clock: Callable[[], float]

    def run(self, mode: Mode, after: Mode | None = None) -> Generator[None, None, float]:
        """One lap; its agreed seconds. Prepares the shape first, if the bench was released since the last one."""
        started = self.clock()
        if self.bench.prepared is not self.shape:
            self._prepare()
        seconds, failure = math.inf, ""
        try:
            seconds = self.bench.run(mode, after)
        except Exception as error:  # out of memory, a kernel that does not take the shape: anything
            failure = _words(error)
        seconds, took = self.bench.agree([seconds, self.clock() - started], failure)
        if math.isinf(seconds):
            where = failure or "on another rank"
            raise CalibrationError(f"a step in {mode.name} failed while calibrating ({where})", mode)
        self.found.seconds += took
        yield
        return seconds

    def _prepare(self) -> None:
        if not self.bench.make_room(self.shape):
            raise _NoRoomError
        failure = ""
        try:
            self.bench.prepare(self.shape)
        except Exception as error:
            failure = _words(error)
        if self.bench.agree([float(bool(failure))])[0]:
            raise CalibrationError(f"a step could not be prepared for calibrating ({failure or 'on another rank'})")


def _take_turns(laps: _Laps) -> Generator[None, None, dict[Mode, float]]:
    """Agreed times: the median, over the rounds, of the modes' mean and of their ratios to the first one.

    The first lap of each mode is a warm-up, and says how many there is time for.
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


def _round(laps: _Laps) -> Generator[None, None, dict[Mode, float]]:
    """A lap of each mode."""
    times = {}
    for mode in MODES:
        times[mode] = yield from laps.run(mode)
    return times


def _switch(laps: _Laps) -> Generator[None, None, float]:
    """How much longer a step takes after one of another mode; the mean of the medians of all pairs of modes."""
    more: dict[tuple[Mode, Mode], list[float]] = {pair: [] for pair in permutations(MODES, 2)}
    for _ in range(SWITCH_LAPS):
        for (mode, before), differences in more.items():
            switched = yield from laps.run(mode, after=before)
            stayed = yield from laps.run(mode, after=mode)
            differences.append(switched - stayed)
    return fmean(median(differences) for differences in more.values())


def _words(error: Exception) -> str:
    logger.debug("a calibration step failed", exc_info=True)
    return f"{type(error).__name__}: {error}"
