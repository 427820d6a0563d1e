"""What a step costs in each mode: monotone curves through measured step times."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import fmean, median
from typing import Any

from sglang_shift.modes import Mode, StepState

PHASES = ("prefill", "decode")

MOST_POINTS, MOST_TOKENS, MOST = 1000, 2**31 - 1, 1e15
"""Of a saved curve: its points, their tokens and their values. More is no step's."""


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
    """

    phase: str
    mode: Mode
    tokens: int
    kv_reads: int
    seconds: float

    @staticmethod
    def from_json(value: dict[str, Any]) -> Measurement:
        """The measurement with these fields.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is something else, or its numbers make no sense.
        """
        phase, tokens, kv_reads, seconds = (value[name] for name in ("phase", "tokens", "kv_reads", "seconds"))
        if phase not in PHASES:
            raise ValueError(f"{phase!r} is no phase of a measurement")
        counted = type(tokens) is type(kv_reads) is int and 1 <= tokens <= MOST_TOKENS and 0 <= kv_reads <= MOST
        if not (counted and _is_number(seconds) and seconds > 0):
            raise ValueError("a measurement has numbers that make no sense")
        return Measurement(phase, Mode(value["mode"]), tokens, kv_reads, float(seconds))


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear function of tokens.

    Between its points it interpolates, before the first it is constant, and beyond the last it goes
    on with the slope of the line from the first point to the last.

    Args:
        tokens: Ascending.
        values: Not descending.
    """

    tokens: tuple[int, ...]
    values: tuple[float, ...]

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

    ``seconds = curve[phase, mode](tokens) + attention[phase] * max(0, kv_reads - usual[phase](tokens))``.
    The curves hold the attention of the steps they were measured on: prompts without a cached prefix,
    decodes at a short context. The second term is the attention beyond that. It works on the same heads,
    tokens and KV cache in both modes, so its coefficient is shared: it decides nothing between them, but
    a prediction without it would not be a step's time.

    Attributes:
        curves: Seconds by phase (``prefill``, ``decode``) and mode.
        usual: KV reads that the curves contain, by phase.
        attention: Seconds per KV read beyond those, by phase.
        switch_seconds: What the first step after a change of mode costs on top.
        noise: By phase, the standard error of the logarithm of the modes' ratio at one number of tokens; none
            where it is not known.
    """

    curves: dict[tuple[str, Mode], Curve]
    usual: dict[str, Curve]
    attention: dict[str, float]
    switch_seconds: float = 0.0
    noise: dict[str, float] = field(default_factory=dict)

    def predict(self, mode: Mode, step: StepState) -> float:
        """Seconds that ``step`` takes in ``mode``."""
        phase = phase_of(step)
        beyond = max(0.0, step.kv_reads - self.usual[phase](step.num_tokens))
        return self.own(mode, step) + self.attention[phase] * beyond

    def own(self, mode: Mode, step: StepState) -> float:
        """The same without the attention beyond the usual, which takes as long in both modes."""
        tokens = step.padded_tokens if mode is Mode.TP else max(step.num_tokens, step.sp_bucket)
        return self.curves[phase_of(step), mode](tokens)

    def continued(self, old: CostModel, measured: Sequence[Measurement]) -> CostModel:
        """This model where it was ``measured``, and ``old`` beyond: in a whole phase, or from some tokens on.

        The two are not fitted together: by what has drifted they disagree, and that is no noise of either. Beyond,
        the modes' ratio is the old one, and both modes are as much slower than they were as the one that is slower
        by more where the measuring ended.
        """
        curves, usual, attention, noise = dict(old.curves), dict(old.usual), dict(old.attention), dict(old.noise)
        for phase in {m.phase for m in measured}:
            last = self.usual[phase].tokens[-1]
            factor = max(self.curves[phase, mode](last) / old.curves[phase, mode](last) for mode in Mode)
            for mode in Mode:
                curves[phase, mode] = self.curves[phase, mode].continued(old.curves[phase, mode], factor)
            usual[phase] = self.usual[phase].continued(old.usual[phase])
            noise[phase] = self.noise[phase]
            if usual[phase].tokens[-1] > last:
                noise[phase] = max(noise[phase], old.noise.get(phase, 0.0))
            shapes = {(m.tokens, m.kv_reads) for m in measured if m.phase == phase}
            if len(shapes) > len({tokens for tokens, _ in shapes}):
                attention[phase] = self.attention[phase]
        return CostModel(curves, usual, attention, self.switch_seconds, noise)

    def crossovers(self, phase: str) -> list[tuple[int, Mode]]:
        """Where the faster mode changes: ``[(tokens from which on, faster mode), ...]``, the first from 1 on."""
        tp, sp = (self.curves[phase, mode] for mode in (Mode.TP, Mode.SP))

        def faster(tokens: int) -> Mode:
            return Mode.SP if sp(tokens) < tp(tokens) else Mode.TP

        found = [(1, faster(1))]
        # From one point of either curve to the next, both are lines: their order changes once at most.
        points = sorted({1, *(tokens for tokens in tp.tokens + sp.tokens if tokens > 1)})
        for start, end in pairwise(points):
            if (then := faster(end)) is not faster(start):
                tokens = range(start + 1, end + 1)
                found.append((tokens[bisect_left(tokens, True, key=lambda n: faster(n) is then)], then))
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON value; :meth:`from_json` reads it."""
        return {
            "curves": {
                f"{phase} {mode.value}": {"tokens": list(c.tokens), "seconds": list(c.values)}
                for (phase, mode), c in self.curves.items()
            },
            "usual": {phase: {"tokens": list(c.tokens), "kv_reads": list(c.values)} for phase, c in self.usual.items()},
            "attention": self.attention,
            "switch_seconds": self.switch_seconds,
            "noise": self.noise,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostModel:
        """The model that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is something else, or its numbers make no sense.
        """
        curves = {
            (phase, mode): _curve(value["curves"][f"{phase} {mode.value}"], "seconds")
            for phase in PHASES
            for mode in Mode
        }
        usual = {phase: _curve(value["usual"][phase], "kv_reads") for phase in PHASES}
        attention = {phase: number_of(value["attention"][phase]) for phase in PHASES}
        raw = dict(value.get("noise", {}))  # older files have none
        noise = {phase: number_of(raw[phase]) for phase in PHASES if phase in raw}
        return CostModel(curves, usual, attention, number_of(value["switch_seconds"]), noise)


def number_of(value: Any) -> float:
    """A number of a saved file, from 0 on.

    Raises:
        ValueError: it is something else; in JSON, integers have any size and floats may be NaN.
    """
    if not _is_number(value) or value < 0:
        raise ValueError(f"what should be a number from 0 to {MOST:g} is something else")
    return float(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -MOST <= value <= MOST  # not a bool, which is an int


def _curve(raw: dict[str, Any], what: str) -> Curve:
    tokens, values = raw["tokens"], raw[what]
    if not (isinstance(tokens, list) and isinstance(values, list) and 1 <= len(tokens) == len(values) <= MOST_POINTS):
        raise ValueError(f"{what} by tokens are not two lists of the same length, from 1 to {MOST_POINTS}")
    if not all(type(t) is int and 1 <= t <= MOST_TOKENS for t in tokens):
        raise ValueError(f"tokens are not whole numbers from 1 to {MOST_TOKENS}")
    ascending = all(a < b for a, b in pairwise(tokens))
    if not (ascending and all(map(_is_number, values)) and values[0] > 0 and all(a <= b for a, b in pairwise(values))):
        raise ValueError(f"{what} by tokens are not a monotone curve of positive numbers up to {MOST:g}")
    return Curve(tuple(tokens), tuple(map(float, values)))


def fit(measurements: Sequence[Measurement], switch_seconds: float = 0.0) -> CostModel:
    """Fit a cost model.

    What decides between the modes is the ratio of their times, and it is measured better than the times,
    as the modes take turns. So for each phase the geometric mean of both, and the logarithm of the ratio,
    are taken over the tokens. Both are made monotone by isotonic least squares, the mean rising and the
    ratio of SP's time to TP's falling: with more tokens, SP's larger weights matter less, and the
    communication that it saves more. Before that, a running median of three takes out a single shape
    that was disturbed. So noise cannot make more than one crossover, and what is measured at one shape
    counts for its neighbours. The curves are made of the two again. The mean goes through the measurements
    with the fewest KV reads of each number of tokens. The attention coefficient of a phase is the median
    slope from those to measurements that differ in KV reads only. The ratio is that of the times without
    the attention beyond the fewest KV reads, and each measurement counts: two shapes of one token that agree
    are no disturbance, though all shapes of more tokens differ from them.

    Raises:
        ValueError: a phase without a shape that was measured in both modes.
    """
    curves: dict[tuple[str, Mode], Curve] = {}
    usual: dict[str, Curve] = {}
    attention: dict[str, float] = {}
    noise: dict[str, float] = {}
    for phase in PHASES:
        rows: dict[int, dict[int, dict[Mode, float]]] = {}
        for m in sorted((m for m in measurements if m.phase == phase), key=lambda m: (m.tokens, m.kv_reads)):
            rows.setdefault(m.tokens, {}).setdefault(m.kv_reads, {})[m.mode] = m.seconds
        shapes = {t: {k: s for k, s in by_reads.items() if len(s) == len(Mode)} for t, by_reads in rows.items()}
        shapes = {t: by_reads for t, by_reads in shapes.items() if by_reads}
        if not shapes:
            raise ValueError(f"no {phase} step was measured in both modes")
        tokens, first = tuple(shapes), [next(iter(by_reads.items())) for by_reads in shapes.values()]
        slopes = [
            (seconds[mode] - start[mode]) / (reads - least)
            for (least, start), by_reads in zip(first, shapes.values(), strict=True)
            for reads, seconds in list(by_reads.items())[1:]
            for mode in Mode
        ]
        attention[phase] = max(0.0, median(slopes)) if slopes else 0.0
        means = isotonic(math.sqrt(s[Mode.TP] * s[Mode.SP]) for _, s in first)
        gains, noise[phase] = _gains(shapes, attention[phase])
        for mode, sign in ((Mode.TP, 0.5), (Mode.SP, -0.5)):
            values = [mean * math.exp(sign * gain) for mean, gain in zip(means, gains, strict=True)]
            curves[phase, mode] = Curve(tokens, tuple(isotonic(values)))
        usual[phase] = Curve(tokens, tuple(isotonic(float(reads) for reads, _ in first)))
    return CostModel(curves, usual, attention, max(0.0, switch_seconds), noise)


def _gains(shapes: dict[int, dict[int, dict[Mode, float]]], attention: float) -> tuple[list[float], float]:
    """The logarithm of TP's time over SP's by tokens, rising, from seconds by tokens, KV reads and mode.

    And the standard error of one of them, that is of what was measured at one number of tokens.
    """
    measured: list[tuple[int, float]] = []
    for tokens, by_reads in shapes.items():
        least = next(iter(by_reads))
        for reads, seconds in by_reads.items():
            without = {mode: s - attention * (reads - least) for mode, s in seconds.items()}
            # Where nearly all is attention, what is left is its noise.
            if all(without[mode] > 0.5 * by_reads[least][mode] for mode in Mode):
                measured.append((tokens, math.log(without[Mode.TP] / without[Mode.SP])))
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
