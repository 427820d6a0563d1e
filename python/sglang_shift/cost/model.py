"""What a step costs in each mode: monotone curves through measured step times.

The classes are what a file of a calibration holds: msgspec reads them, within the bounds that their fields name.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import fmean, geometric_mean, median
from typing import Annotated

from msgspec import Meta

from sglang_shift.modes import MODES, Mode, StepState

PHASES = ("prefill", "decode")

MOST_POINTS, MOST_TOKENS, MOST = 1000, 2**31 - 1, 10**15
"""Of a saved curve: its points, their tokens and their values. More is no step's."""

Tokens = Annotated[int, Meta(ge=1, le=MOST_TOKENS)]
Positive = Annotated[float, Meta(gt=0, le=MOST)]
NotNegative = Annotated[float, Meta(ge=0, le=MOST)]


def phase_of(step: StepState) -> str:
    """The phase whose times ``step`` has: one with any prompt tokens is a prefill."""
    return "prefill" if step.num_prefill_tokens else "decode"


@dataclass(frozen=True)
class Measurement:
    """One step shape, timed in one mode.

    Attributes:
        phase: ``prefill`` or ``decode``.
        mode: The mode.
        tokens: Tokens of the step.
        kv_reads: As in :class:`StepState`.
        seconds: Median time of the step, of the slowest rank.

    Raises:
        ValueError: there is no such phase.
    """

    phase: str
    mode: Mode
    tokens: Tokens
    kv_reads: Annotated[int, Meta(ge=0, le=MOST)]
    seconds: Positive

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"{self.phase!r} is no phase of a measurement")


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear function of tokens.

    Between its points it interpolates, before the first it is constant, and beyond the last it goes
    on with the slope of the line from the first point to the last.

    Args:
        tokens: Ascending.
        values: Not descending, one for each of ``tokens``.

    Raises:
        ValueError: they are something else.
    """

    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=1, max_length=MOST_POINTS)]
    values: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(f"a curve has {len(self.tokens)} numbers of tokens and {len(self.values)} values")
        if any(a >= b for a, b in pairwise(self.tokens)) or any(a > b for a, b in pairwise(self.values)):
            raise ValueError("the tokens of a curve do not ascend, or its values descend")

    def __call__(self, tokens: int) -> float:
        """The value for ``tokens``."""
        xs, ys = self.tokens, self.values
        i = bisect_right(xs, tokens)
        if i == 0 or len(xs) == 1:
            return ys[0]
        if i == len(xs):
            return ys[-1] + (tokens - xs[-1]) * (ys[-1] - ys[0]) / (xs[-1] - xs[0])
        return ys[i - 1] + (tokens - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])

    def continued(self, old: Curve, factor: float = 1.0) -> Curve:
        """This curve and, beyond its last point, ``factor`` times ``old``, where that is not below it."""
        least = self.values[-1]
        more = [(t, max(least, factor * v)) for t, v in zip(old.tokens, old.values, strict=True) if t > self.tokens[-1]]
        return Curve((*self.tokens, *(t for t, _ in more)), (*self.values, *(v for _, v in more)))


@dataclass(frozen=True)
class CostModel:
    """Predicted step times.

    ``seconds = curves[phase][mode](tokens) + attention[phase] * max(0, kv_reads - usual[phase](tokens))``.
    The curves hold the attention of the steps they were measured on: prompts without a cached prefix,
    decodes at a short context. The second term is the attention beyond that. It works on the same heads,
    tokens and KV cache in every mode, so its coefficient is shared: it decides nothing between them, but
    a prediction without it would not be a step's time.

    Attributes:
        curves: Seconds by phase (``prefill``, ``decode``) and mode.
        usual: KV reads that the curves contain, by phase.
        attention: Seconds per KV read beyond those, by phase.
        switch_seconds: What the first step after a change of mode costs on top.
        noise: By phase, and by mode but for the first one, the standard error of the logarithm of the ratio of the
            first mode's time to the mode's, at one number of tokens; none if it is not known.

    Raises:
        ValueError: a phase or a mode is missing.
    """

    curves: dict[str, dict[Mode, Curve]]
    usual: dict[str, Curve]
    attention: dict[str, NotNegative]
    switch_seconds: NotNegative
    noise: dict[str, dict[Mode, NotNegative]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, by_phase in (("curves", self.curves), ("usual", self.usual), ("attention", self.attention)):
            if set(by_phase) != set(PHASES):
                raise ValueError(f"the {name} of a cost model are of {', '.join(by_phase) or 'no phase'}")
        if any(set(by_mode) != set(MODES) for by_mode in self.curves.values()):
            raise ValueError(f"a cost model has no curve for one of the modes {', '.join(MODES)}")

    def predict(self, mode: Mode, step: StepState) -> float:
        """Seconds that ``step`` takes in ``mode``."""
        phase = phase_of(step)
        beyond = max(0.0, step.kv_reads - self.usual[phase](step.num_tokens))
        return self.own(mode, step) + self.attention[phase] * beyond

    def own(self, mode: Mode, step: StepState) -> float:
        """The same without the attention beyond the usual, which takes as long in every mode."""
        return self.curves[phase_of(step)][mode](step.padded[mode])

    def unsure(self, phase: str, mode: Mode, other: Mode) -> float:
        """The standard error of the logarithm of the ratio of two modes' times; 0 if it is not known."""
        noise = self.noise.get(phase, {})
        return math.hypot(noise.get(mode, 0.0), noise.get(other, 0.0))

    def faster(self, phase: str, tokens: int) -> Mode:
        """The mode with the lowest curve at ``tokens``; of equal ones, the first of the family."""
        curves = self.curves[phase]
        return min(MODES, key=lambda mode: curves[mode](tokens))

    def continued(self, old: CostModel, measured: Sequence[Measurement]) -> CostModel:
        """This model where it was ``measured``, and ``old`` beyond: in a whole phase, or from some tokens on.

        The two are not fitted together: by what has drifted they disagree, and that is no noise of either. Beyond,
        the modes' ratios are the old ones, and all modes are as much slower than they were as the one that is slower
        by most where the measuring ended.
        """
        curves, usual, attention, noise = dict(old.curves), dict(old.usual), dict(old.attention), dict(old.noise)
        for phase in {m.phase for m in measured}:
            mine, theirs = self.curves[phase], old.curves[phase]
            last = self.usual[phase].tokens[-1]
            factor = max(mine[mode](last) / theirs[mode](last) for mode in MODES)
            curves[phase] = {mode: mine[mode].continued(theirs[mode], factor) for mode in MODES}
            usual[phase] = self.usual[phase].continued(old.usual[phase])
            noise[phase] = self.noise[phase]
            if usual[phase].tokens[-1] > last:
                before = old.noise.get(phase, {})
                noise[phase] = {mode: max(n, before.get(mode, 0.0)) for mode, n in noise[phase].items()}
            shapes = {(m.tokens, m.kv_reads) for m in measured if m.phase == phase}
            if len(shapes) > len({tokens for tokens, _ in shapes}):
                attention[phase] = self.attention[phase]
        return CostModel(curves, usual, attention, self.switch_seconds, noise)

    def crossovers(self, phase: str) -> list[tuple[int, Mode]]:
        """Where the fastest mode changes: ``[(tokens from which on, fastest mode), ...]``, the first from 1 on."""
        found = [(1, self.faster(phase, 1))]
        knots = sorted({1, *(t for curve in self.curves[phase].values() for t in curve.tokens)})
        # From one knot to the next all curves are lines, so each mode is the fastest in one stretch at most.
        for start, end in pairwise(knots):
            while self.faster(phase, end) is not (now := found[-1][1]):
                found.append(self._next_crossover(phase, now, max(start, found[-1][0]), end))
        return found

    def _next_crossover(self, phase: str, now: Mode, start: int, end: int) -> tuple[int, Mode]:
        tokens = range(start + 1, end + 1)
        crossover = tokens[bisect_left(tokens, True, key=lambda n: self.faster(phase, n) is not now)]
        return crossover, self.faster(phase, crossover)


Shapes = dict[int, dict[int, dict[Mode, float]]]
"""Measured seconds by tokens, KV reads and mode; both numbers ascend."""


def fit(measurements: Sequence[Measurement], switch_seconds: float = 0.0) -> CostModel:
    """Fit a cost model.

    What decides between the modes is the ratio of their times, and it is measured better than the times,
    as the modes take turns. So for each phase the geometric mean over the modes, and for each mode but the first
    (TP) the logarithm of the ratio of TP's time to its own, are taken over the tokens. They are made monotone by
    isotonic least squares, the mean rising and the ratios, too: with more tokens, SP's larger weights matter less,
    and the communication that it saves more. Before that, a running median of three takes out a single shape
    that was disturbed. So noise cannot make more than one crossover with TP, and what is measured at one shape
    counts for its neighbours. The curves are made of the means and the ratios again. The mean goes through the
    measurements with the fewest KV reads of each number of tokens. The attention coefficient of a phase is the median
    slope from those to measurements that differ in KV reads only. The ratio is that of the times without
    the attention beyond the fewest KV reads, and each measurement counts: two shapes of one token that agree
    are no disturbance, though all shapes of more tokens differ from them.

    Raises:
        ValueError: a phase without a shape that was measured in every mode.
    """
    first, *others = MODES
    curves: dict[str, dict[Mode, Curve]] = {}
    usual: dict[str, Curve] = {}
    attention: dict[str, float] = {}
    noise: dict[str, dict[Mode, float]] = {}
    for phase in PHASES:
        shapes = _whole_shapes(measurements, phase)
        least = [next(iter(by_reads.items())) for by_reads in shapes.values()]
        attention[phase] = _attention(shapes)
        means = isotonic(geometric_mean(seconds.values()) for _, seconds in least)
        gains, noise[phase] = {first: [0.0] * len(shapes)}, {}
        for mode in others:
            gains[mode], noise[phase][mode] = _gains(shapes, attention[phase], first, mode)
        shared = [fmean(at) for at in zip(*gains.values(), strict=True)]
        curves[phase] = {}
        for mode, of_mode in gains.items():
            values = [mean * math.exp(s - g) for mean, s, g in zip(means, shared, of_mode, strict=True)]
            curves[phase][mode] = Curve(tuple(shapes), tuple(isotonic(values)))
        usual[phase] = Curve(tuple(shapes), tuple(isotonic(float(reads) for reads, _ in least)))
    return CostModel(curves, usual, attention, max(0.0, switch_seconds), noise)


def _whole_shapes(measurements: Sequence[Measurement], phase: str) -> Shapes:
    """The shapes of ``phase`` that were measured in every mode."""
    rows: Shapes = {}
    for m in sorted((m for m in measurements if m.phase == phase), key=lambda m: (m.tokens, m.kv_reads)):
        rows.setdefault(m.tokens, {}).setdefault(m.kv_reads, {})[m.mode] = m.seconds
    shapes = {t: {k: s for k, s in by_reads.items() if len(s) == len(MODES)} for t, by_reads in rows.items()}
    if not any(shapes.values()):
        raise ValueError(f"no {phase} step was measured in every mode")
    return {t: by_reads for t, by_reads in shapes.items() if by_reads}


def _attention(shapes: Shapes) -> float:
    """Seconds per KV read: the median slope from the fewest reads of a number of tokens to more, in any mode."""
    slopes = []
    for by_reads in shapes.values():
        (least, start), *more = by_reads.items()
        slopes += [(seconds[mode] - start[mode]) / (reads - least) for reads, seconds in more for mode in MODES]
    return max(0.0, median(slopes)) if slopes else 0.0


def _gains(shapes: Shapes, attention: float, first: Mode, mode: Mode) -> tuple[list[float], float]:
    """The logarithm of ``first``'s time over ``mode``'s by tokens, rising.

    And the standard error of one of them, that is of what was measured at one number of tokens.
    """
    measured: list[tuple[int, float]] = []
    for tokens, by_reads in shapes.items():
        least = next(iter(by_reads))
        for reads, seconds in by_reads.items():
            without = {m: seconds[m] - attention * (reads - least) for m in (first, mode)}
            # Where nearly all is attention, what is left is its noise.
            if all(own > 0.5 * by_reads[least][m] for m, own in without.items()):
                measured.append((tokens, math.log(without[first] / without[mode])))
    smooth = running_median([gain for _, gain in measured])
    gains = isotonic(fmean(s for (t, _), s in zip(measured, smooth, strict=True) if t == tokens) for tokens in shapes)
    fitted = dict(zip(shapes, gains, strict=True))
    noise = 1.4826 * median(abs(gain - fitted[tokens]) for tokens, gain in measured)
    return beyond_noise(gains, noise), noise / math.sqrt(len(measured) / len(shapes))


def beyond_noise(gains: Sequence[float], noise: float) -> list[float]:
    """Rising gains, without those above 0 that are less than twice their standard error.

    Args:
        gains: Not descending; as many equal ones share the noise of their mean.
        noise: Standard deviation of one. The caller's is 1.4826 times the median absolute residual, which a
            few disturbed measurements do not move (Rousseeuw and Croux, 1993).
    """
    clear = (0.0 if 0 < gain < 2 * noise / math.sqrt(gains.count(gain)) else gain for gain in gains)
    return list(accumulate(clear, max))


def running_median(values: Sequence[float]) -> list[float]:
    """Medians of three neighbours, with Tukey's rule for the ends (Exploratory Data Analysis, 1977).

    A monotone sequence comes out as it went in, but for its ends where they are not in line.
    """
    if len(values) < 3:
        return list(values)
    inner = [median(values[i - 1 : i + 2]) for i in range(1, len(values) - 1)]
    ends = [
        median((value, near, 3 * near - 2 * far))
        for value, near, far in (
            (values[0], inner[0], (inner + inner)[1]),
            (values[-1], inner[-1], (inner + inner)[-2]),
        )
    ]
    return [ends[0], *inner, ends[1]]


def isotonic(values: Iterable[float]) -> list[float]:
    """The non-descending sequence closest to ``values`` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
