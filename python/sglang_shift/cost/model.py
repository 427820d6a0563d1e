"""The cost model predicts the time of a step in each mode, by monotone curves through measured step times.

A calibration file stores these classes. msgspec reads them, and checks the limits that the fields state.
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

MAX_POINTS, MAX_TOKENS, MAX_VALUE = 1000, 2**31 - 1, 10**15
"""Limits of a saved curve: the number of its points, its tokens and its values. No real step exceeds them."""

Tokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Positive = Annotated[float, Meta(gt=0, le=MAX_VALUE)]
NotNegative = Annotated[float, Meta(ge=0, le=MAX_VALUE)]


def phase_of(step: StepState) -> str:
    """Return the phase whose times ``step`` has. A step with any prompt tokens is a prefill."""
    return "prefill" if step.num_prefill_tokens else "decode"


@dataclass(frozen=True)
class Measurement:
    """The time of one step shape in one mode.

    Attributes:
        phase: ``prefill`` or ``decode``.
        mode: The mode.
        tokens: Tokens of the step.
        kv_reads: Query-key pairs, as in :class:`StepState`.
        seconds: Median time of the step on the slowest rank.

    Raises:
        ValueError: the phase does not exist.
    """

    phase: str
    mode: Mode
    tokens: Tokens
    kv_reads: Annotated[int, Meta(ge=0, le=MAX_VALUE)]
    seconds: Positive

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"{self.phase!r} is no phase of a measurement")


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear function of tokens.

    The curve interpolates between its points, and is constant before the first point. Beyond the last point, it has
    the slope of the line from the first point to the last point.

    Args:
        tokens: Numbers of tokens, ascending.
        values: One value for each of ``tokens``, not descending.

    Raises:
        ValueError: the tokens or the values are something else.
    """

    tokens: Annotated[tuple[Tokens, ...], Meta(min_length=1, max_length=MAX_POINTS)]
    values: tuple[Positive, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(f"a curve has {len(self.tokens)} numbers of tokens and {len(self.values)} values")
        if any(a >= b for a, b in pairwise(self.tokens)) or any(a > b for a, b in pairwise(self.values)):
            raise ValueError("the tokens of a curve do not ascend, or its values descend")

    def __call__(self, tokens: int) -> float:
        """Return the value for ``tokens``."""
        xs, ys = self.tokens, self.values
        i = bisect_right(xs, tokens)
        if i == 0 or len(xs) == 1:
            return ys[0]
        if i == len(xs):
            return ys[-1] + (tokens - xs[-1]) * (ys[-1] - ys[0]) / (xs[-1] - xs[0])
        return ys[i - 1] + (tokens - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])

    def extended_by(self, old: Curve, factor: float = 1.0) -> Curve:
        """Return this curve, with ``factor`` times ``old`` beyond its last point, but no value below its last value."""
        least = self.values[-1]
        more = [(t, max(least, factor * v)) for t, v in zip(old.tokens, old.values, strict=True) if t > self.tokens[-1]]
        return Curve((*self.tokens, *(t for t, _ in more)), (*self.values, *(v for _, v in more)))


@dataclass(frozen=True)
class CostModel:
    """Predicts step times.

    ``seconds = curves[phase][mode](tokens) + attention[phase] * max(0, kv_reads - usual[phase](tokens))``.
    In a step with prompt tokens and decoding requests, the KV reads of these requests are not part of ``kv_reads``
    here. They cost ``attention["decode"]`` each: attention of prompts is arithmetic, but a decode mostly reads memory.
    The curves contain the attention of the measured steps: prompts without a cached prefix, and decodes at a short
    context. The second term is the attention beyond that. Attention works on the same heads, tokens and KV cache in
    every mode, so all modes share its coefficient. It does not decide between the modes, but it is part of a step's
    time.

    Attributes:
        curves: Seconds by phase (``prefill``, ``decode``) and mode.
        usual: KV reads that the curves contain, by phase.
        attention: Seconds per KV read beyond the usual KV reads, by phase.
        switch_seconds: Seconds that the first step after a change of mode takes longer.
        noise: By phase and mode, the standard error of the logarithm of a ratio at one number of tokens. The ratio is
            the first mode's time over the mode's time. The first mode has no entry. The mapping is empty if the errors
            are not known.

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
        """Return the seconds that ``step`` takes in ``mode``."""
        return self.seconds_without_long_attention(mode, step) + self.long_attention_seconds(step)

    def fastest_seconds(self, step: StepState, modes: Sequence[Mode] = MODES) -> float:
        """Return the seconds that ``step`` takes in the fastest of ``modes``."""
        fastest = min(self.seconds_without_long_attention(mode, step) for mode in modes)
        return fastest + self.long_attention_seconds(step)

    def long_attention_seconds(self, step: StepState) -> float:
        """Return the seconds of the attention that the curves do not contain."""
        phase = phase_of(step)
        beyond = max(0.0, step.kv_reads - step.decode_kv_reads - self.usual[phase](step.num_tokens))
        return self.attention[phase] * beyond + self.attention["decode"] * step.decode_kv_reads

    def seconds_without_long_attention(self, mode: Mode, step: StepState) -> float:
        """Return the seconds without the attention beyond the usual, which takes equally long in every mode."""
        return self.curves[phase_of(step)][mode](step.padded[mode])

    def ratio_error(self, phase: str, mode: Mode, other: Mode) -> float:
        """Return the standard error of the logarithm of the ratio of two modes' times; 0 if it is not known."""
        noise = self.noise.get(phase, {})
        return math.hypot(noise.get(mode, 0.0), noise.get(other, 0.0))

    def faster(self, phase: str, tokens: int) -> Mode:
        """Return the mode with the lowest curve at ``tokens``. Of equal modes, return the first of the family."""
        curves = self.curves[phase]
        return min(MODES, key=lambda mode: curves[mode](tokens))

    def extended_by(self, old: CostModel, measured: Sequence[Measurement]) -> CostModel:
        """Return a model that is this model in the ``measured`` range, and follows ``old`` beyond this range.

        A phase without measurements is beyond the range, and so are more tokens than were measured. The two models are
        not fitted together: drift makes them disagree, and this disagreement is not noise. Beyond the range, the modes'
        ratios are the ratios of ``old``. In a measured phase, one factor multiplies all times of ``old`` beyond the
        range. This is the largest factor by which any mode has become slower at the end of the range.
        """
        curves, usual, attention, noise = dict(old.curves), dict(old.usual), dict(old.attention), dict(old.noise)
        for phase in {m.phase for m in measured}:
            mine, theirs = self.curves[phase], old.curves[phase]
            last = self.usual[phase].tokens[-1]
            factor = max(mine[mode](last) / theirs[mode](last) for mode in MODES)
            curves[phase] = {mode: mine[mode].extended_by(theirs[mode], factor) for mode in MODES}
            usual[phase] = self.usual[phase].extended_by(old.usual[phase])
            noise[phase] = self.noise[phase]
            if usual[phase].tokens[-1] > last:
                before = old.noise.get(phase, {})
                noise[phase] = {mode: max(n, before.get(mode, 0.0)) for mode, n in noise[phase].items()}
            shapes = {(m.tokens, m.kv_reads) for m in measured if m.phase == phase}
            if len(shapes) > len({tokens for tokens, _ in shapes}):
                attention[phase] = self.attention[phase]
        return CostModel(curves, usual, attention, self.switch_seconds, noise)

    def crossovers(self, phase: str) -> list[tuple[int, Mode]]:
        """Return the fastest modes: ``[(first number of tokens, fastest mode), ...]``. The first entry starts at 1."""
        found = [(1, self.faster(phase, 1))]
        knots = sorted({1, *(t for curve in self.curves[phase].values() for t in curve.tokens)})
        # Between two knots all curves are lines, so each mode is the fastest in at most one interval.
        for start, end in pairwise(knots):
            while self.faster(phase, end) is not (now := found[-1][1]):
                found.append(self._next_crossover(phase, now, max(start, found[-1][0]), end))
        return found

    def _next_crossover(self, phase: str, now: Mode, start: int, end: int) -> tuple[int, Mode]:
        tokens = range(start + 1, end + 1)
        crossover = tokens[bisect_left(tokens, True, key=lambda n: self.faster(phase, n) is not now)]
        return crossover, self.faster(phase, crossover)


Shapes = dict[int, dict[int, dict[Mode, float]]]
"""Measured seconds by tokens, KV reads and mode. Tokens and KV reads ascend."""


def fit(measurements: Sequence[Measurement], switch_seconds: float = 0.0) -> CostModel:
    """Fit a cost model.

    The ratio of the modes' times decides between the modes. It is measured more precisely than the times, because the
    modes take turns. So two quantities are fitted over the tokens in each phase. One is the geometric mean of the
    modes' times. The other is the logarithm of the ratio of TP's time to the time of each other mode. TP is the first
    mode.

    Isotonic least squares make both rise with the tokens. The ratios rise because, with more tokens, SP's larger
    weights matter less, and the communication that SP saves matters more. Before that, a running median of three
    removes a single disturbed shape from the ratios. So noise cannot make more than one crossover with TP, and a
    measurement at one shape counts for its neighbours. The curves are computed from the means and the ratios.

    The mean goes through the measurements with the fewest KV reads of each number of tokens. Other measurements differ
    from these in KV reads only. The attention coefficient of a phase is the median slope between the two. The ratios
    are fitted to the times without the attention beyond the fewest KV reads. All measurements count for the ratios. If
    two shapes with one number of tokens agree, they are no disturbance, even if all shapes of more tokens differ.

    Raises:
        ValueError: a phase has no shape that was measured in every mode.
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
    """Return the shapes of ``phase`` that were measured in every mode."""
    rows: Shapes = {}
    for m in sorted((m for m in measurements if m.phase == phase), key=lambda m: (m.tokens, m.kv_reads)):
        rows.setdefault(m.tokens, {}).setdefault(m.kv_reads, {})[m.mode] = m.seconds
    shapes = {t: {k: s for k, s in by_reads.items() if len(s) == len(MODES)} for t, by_reads in rows.items()}
    if not any(shapes.values()):
        raise ValueError(f"no {phase} step was measured in every mode")
    return {t: by_reads for t, by_reads in shapes.items() if by_reads}


def _attention(shapes: Shapes) -> float:
    """Return seconds per KV read.

    This is the median slope over all modes, from the fewest KV reads of a number of tokens to more KV reads.
    """
    slopes = []
    for by_reads in shapes.values():
        (least, start), *more = by_reads.items()
        slopes += [(seconds[mode] - start[mode]) / (reads - least) for reads, seconds in more for mode in MODES]
    return max(0.0, median(slopes)) if slopes else 0.0


def _gains(shapes: Shapes, attention: float, first: Mode, mode: Mode) -> tuple[list[float], float]:
    """Return the logarithm of ``first``'s time over ``mode``'s time by tokens, rising, and its standard error.

    The standard error is that of the value at one number of tokens.
    """
    measured: list[tuple[int, float]] = []
    for tokens, by_reads in shapes.items():
        least = next(iter(by_reads))
        for reads, seconds in by_reads.items():
            without = {m: seconds[m] - attention * (reads - least) for m in (first, mode)}
            # If attention is nearly all of the time, the rest is mostly its noise.
            if all(rest > 0.5 * by_reads[least][m] for m, rest in without.items()):
                measured.append((tokens, math.log(without[first] / without[mode])))
    smooth = running_median([gain for _, gain in measured])
    gains = isotonic(fmean(s for (t, _), s in zip(measured, smooth, strict=True) if t == tokens) for tokens in shapes)
    fitted = dict(zip(shapes, gains, strict=True))
    noise = 1.4826 * median(abs(gain - fitted[tokens]) for tokens, gain in measured)
    return remove_noise(gains, noise), noise / math.sqrt(len(measured) / len(shapes))


def remove_noise(gains: Sequence[float], noise: float) -> list[float]:
    """Return rising gains, with 0 instead of positive gains that are less than twice their standard error.

    Args:
        gains: Not descending. Equal gains share the noise of their mean.
        noise: Standard deviation of one gain. The caller gives 1.4826 times the median absolute residual, which a few
            disturbed measurements do not move (Rousseeuw and Croux, 1993).
    """
    clear = (0.0 if 0 < gain < 2 * noise / math.sqrt(gains.count(gain)) else gain for gain in gains)
    return list(accumulate(clear, max))


def running_median(values: Sequence[float]) -> list[float]:
    """Return medians of three neighbours, with Tukey's rule for the ends (Exploratory Data Analysis, 1977).

    A monotone sequence does not change, except at an end that is out of line.
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
    """Return the non-descending sequence that is closest to ``values`` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
