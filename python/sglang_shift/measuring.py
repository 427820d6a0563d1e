"""Measuring step times: both modes over a grid of step shapes, on all ranks together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from sglang_shift.calibration import CalibrationError
from sglang_shift.cost_model import Measurement
from sglang_shift.modes import Mode

logger = logging.getLogger(__name__)

BUDGET_CPU, BUDGET_GPU = 60.0, 20.0
"""Seconds that a calibration may take."""
CONTEXT, LONG_CONTEXT = 128, 2048
"""Tokens of KV cache that a request of a decode shape has."""
MAX_DECODE = 512
"""Requests of the largest decode shape."""
SECONDS_A_MODE, MIN_LAPS, MAX_LAPS = 0.4, 2, 9
"""How long and how often a shape is timed in one mode."""
SWITCH_TOKENS = (1, 8)
"""Tokens of the shapes at which a change of mode is timed."""


@dataclass(frozen=True, order=True)
class Shape:
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


def grid(chunk: int, max_requests: int, longest: int, slots: int) -> list[Shape]:
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
    shapes = [Shape("prefill", n, 0, longest) for n in powers(min(chunk, slots))]
    shapes += [Shape("prefill", n, long, longest) for n in powers(min(chunk, longest - long))[-3::2]]
    most = min(max_requests, MAX_DECODE, max(1, slots // (short + 1)))
    shapes += [Shape("decode", n, short, longest) for n in powers(most)]
    shapes += [Shape("decode", n, long, longest) for n in powers(most)[::3] if n * (long + 1) <= slots]
    return sorted({s for s in shapes if s.slots <= slots}, key=lambda s: (s.tokens * (s.context + 64), s))


def powers(last: int) -> list[int]:
    """1, 2, 4, ... and ``last``."""
    return [2**i for i in range(last.bit_length()) if 2**i < last] + [last]


class Bench(Protocol):
    """Something that can run steps of a shape: :class:`sglang_shift.bench.SchedulerBench`, or a test's."""

    def prepare(self, shape: Shape) -> Callable[[Mode], float]:
        """Get ready; the result runs one step and returns its seconds."""

    def release(self) -> None:
        """Free what :meth:`prepare` took."""

    def fits(self, shape: Shape) -> bool:
        """Whether there is room for it: the same on every rank."""

    def agree(self, seconds: Sequence[float]) -> list[float]:
        """The largest of each number over all ranks."""


@dataclass
class Measured:
    """What :func:`measure` found so far.

    Attributes:
        steps: Step times.
        switches: What a step after a change of mode took beyond one without, in seconds.
        seconds: What it all took.
    """

    steps: list[Measurement] = field(default_factory=list)
    switches: list[float] = field(default_factory=list)
    seconds: float = 0.0


def measure(
    bench: Bench,
    shapes: Sequence[Shape],
    budget: float,
    found: Measured,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[float]:
    """Time all shapes in both modes; a generator, so that a serving scheduler can do a shape at a time.

    All ranks do the same: every decision follows from numbers that they have agreed on. The modes take
    turns, so that a machine that is slower for a while is so for both.

    Args:
        bench: What runs the steps.
        shapes: From small to large.
        budget: Seconds; shapes that would exceed it are left out, but for the first of each phase.
        found: Is added to.
        clock: Monotonic seconds.

    Yields:
        The part done, up to 1, after each shape.

    Raises:
        CalibrationError: a mode failed on some rank.
    """
    before: dict[str, tuple[int, float]] = {}
    for done, shape in enumerate(shapes, 1):
        tokens, took = before.get(shape.phase, (shape.tokens, 0.0))
        affordable = found.seconds + took * max(1.0, shape.tokens / tokens) <= budget or shape.phase not in before
        if affordable and bench.fits(shape):
            started = clock()
            try:
                run = bench.prepare(shape)
                times = _take_turns(bench, run)
                if shape.tokens in SWITCH_TOKENS and max(times.values()) < SECONDS_A_MODE:
                    found.switches.append(_switch(bench, run, times))
            finally:
                bench.release()
            for mode in Mode:
                found.steps.append(Measurement(shape.phase, mode, shape.tokens, shape.kv_reads, times[mode]))
            (took,) = bench.agree([clock() - started])
            before[shape.phase] = shape.tokens, took
            found.seconds += took
        yield done / len(shapes)


def _take_turns(bench: Bench, run: Callable[[Mode], float]) -> dict[Mode, float]:
    """Agreed times: the median, over the rounds, of the modes' mean and of their ratio.

    The first lap of each mode is a warm-up, and says how many there is time for.
    """
    warm_up = max(_agreed(bench, run, mode) for mode in Mode)
    laps = max(MIN_LAPS, min(MAX_LAPS, int(SECONDS_A_MODE / max(warm_up, 1e-6))))
    rounds = [{mode: _agreed(bench, run, mode) for mode in Mode} for _ in range(laps)]
    mean = median(math.sqrt(times[Mode.TP] * times[Mode.SP]) for times in rounds)
    ratio = math.sqrt(median(times[Mode.SP] / times[Mode.TP] for times in rounds))
    return {Mode.TP: mean / ratio, Mode.SP: mean * ratio}


def _switch(bench: Bench, run: Callable[[Mode], float], turns: dict[Mode, float]) -> float:
    """How much longer a step takes in turns than after steps of its own mode; mean of both modes."""
    alone = [median([_agreed(bench, run, mode) for _ in range(MAX_LAPS)][1:]) for mode in Mode]
    return (sum(turns.values()) - sum(alone)) / 2


def _agreed(bench: Bench, run: Callable[[Mode], float], mode: Mode) -> float:
    try:
        mine, problem = run(mode), "on another rank"
    except Exception as error:  # out of memory, a kernel that does not take the shape: anything
        logger.debug("a calibration step failed", exc_info=True)
        mine, problem = math.inf, f"{type(error).__name__}: {error}"
    (seconds,) = bench.agree([mine])
    if math.isinf(seconds):
        raise CalibrationError(f"a step in {mode.value.upper()} failed while calibrating ({problem})", mode)
    return seconds
