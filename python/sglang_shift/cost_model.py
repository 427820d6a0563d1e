"""What a step costs in each mode: monotone curves through measured step times."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any

from sglang_shift.modes import Mode, StepState


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


@dataclass(frozen=True)
class Curve:
    """A monotone piecewise-linear function from tokens to seconds.

    Between its points it interpolates, before the first it is constant, and beyond the last it goes
    on with the slope of the line from the first point to the last.

    Args:
        tokens: Ascending.
        seconds: Not descending.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: int) -> float:
        """Seconds for ``tokens``."""
        xs, ys = self.tokens, self.seconds
        i = bisect_right(xs, tokens)
        if i == 0 or len(xs) == 1:
            return ys[0]
        if i == len(xs):
            return ys[-1] + (tokens - xs[-1]) * (ys[-1] - ys[0]) / (xs[-1] - xs[0])
        return ys[i - 1] + (tokens - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(frozen=True)
class CostModel:
    """Predicted step times.

    ``seconds = curve[phase, mode](tokens) + attention[phase] * kv_reads``. Attention works on the same
    heads, tokens and KV cache in both modes, so its coefficient is shared: it decides nothing between
    them, but a prediction without it would not be a step's time.

    Attributes:
        curves: By phase (``prefill``, ``decode``) and mode.
        attention: Seconds per KV read, by phase.
        switch_seconds: What the first step after a change of mode costs on top.
    """

    curves: dict[tuple[str, Mode], Curve]
    attention: dict[str, float]
    switch_seconds: float = 0.0

    def predict(self, mode: Mode, step: StepState) -> float:
        """Seconds that ``step`` takes in ``mode``. A step with any prompt tokens counts as prefill."""
        if step.num_prefill_tokens:
            return self.curves["prefill", mode](step.num_tokens) + self.attention["prefill"] * step.kv_reads
        tokens = max(step.num_tokens, step.bucket)
        return self.curves["decode", mode](tokens) + self.attention["decode"] * step.kv_reads

    def crossovers(self, phase: str) -> list[tuple[int, Mode]]:
        """Where the faster mode changes: ``[(tokens from which on, faster mode), ...]``, the first from 1 on."""
        tp, sp = (self.curves[phase, mode] for mode in (Mode.TP, Mode.SP))
        found: list[tuple[int, Mode]] = []
        for tokens in range(1, max(tp.tokens[-1], sp.tokens[-1]) + 1):
            mode = Mode.SP if sp(tokens) < tp(tokens) else Mode.TP
            if not found or found[-1][1] is not mode:
                found.append((tokens, mode))
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON value; :meth:`from_json` reads it."""
        curves = {
            f"{phase} {mode.value}": {"tokens": list(c.tokens), "seconds": list(c.seconds)}
            for (phase, mode), c in self.curves.items()
        }
        return {"curves": curves, "attention": self.attention, "switch_seconds": self.switch_seconds}

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostModel:
        """The model that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: ``value`` is something else, or its numbers make no sense.
        """
        curves = {}
        for phase in ("prefill", "decode"):
            for mode in Mode:
                raw = value["curves"][f"{phase} {mode.value}"]
                tokens = tuple(int(t) for t in raw["tokens"])
                seconds = tuple(float(s) for s in raw["seconds"])
                ascending = all(a < b for a, b in zip(tokens, tokens[1:], strict=False))
                monotone = all(a <= b for a, b in zip(seconds, seconds[1:], strict=False))
                if not (tokens and len(tokens) == len(seconds) and ascending and monotone and seconds[0] > 0):
                    raise ValueError(f"the {phase} {mode.value} curve is not a monotone curve of positive times")
                curves[phase, mode] = Curve(tokens, seconds)
        attention = {phase: float(value["attention"][phase]) for phase in ("prefill", "decode")}
        return CostModel(curves, attention, float(value["switch_seconds"]))


def fit(measurements: Sequence[Measurement], switch_seconds: float = 0.0) -> CostModel:
    """Fit a cost model.

    The attention coefficient of a phase is the median slope between measurements of the same tokens
    and mode at different KV reads, at least 0. What remains of each time is made monotone in the
    tokens by the pool-adjacent-violators algorithm (isotonic least squares; Ayer et al. 1955).

    Raises:
        ValueError: a phase and mode without any measurement.
    """
    curves: dict[tuple[str, Mode], Curve] = {}
    attention: dict[str, float] = {}
    for phase in ("prefill", "decode"):
        mine = [m for m in measurements if m.phase == phase]
        slopes = [
            (b.seconds - a.seconds) / (b.kv_reads - a.kv_reads)
            for _, same in groupby(sorted(mine, key=_shape), key=lambda m: (m.mode, m.tokens))
            for a, b in _pairs(list(same))
        ]
        attention[phase] = max(0.0, median(slopes)) if slopes else 0.0
        for mode in Mode:
            rest: dict[int, list[float]] = {}
            for m in mine:
                if m.mode is mode:
                    rest.setdefault(m.tokens, []).append(m.seconds - attention[phase] * m.kv_reads)
            if not rest:
                raise ValueError(f"no {phase} step was measured in {mode.value.upper()}")
            tokens = sorted(rest)
            floor = 1e-3 * min(m.seconds for m in mine)
            values = [max(floor, median(rest[t])) for t in tokens]
            curves[phase, mode] = Curve(tuple(tokens), tuple(isotonic(values)))
    return CostModel(curves, attention, max(0.0, switch_seconds))


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


def _shape(m: Measurement) -> tuple[Mode, int, int]:
    return m.mode, m.tokens, m.kv_reads


def _pairs(same: list[Measurement]) -> list[tuple[Measurement, Measurement]]:
    """The extremes in KV reads of measurements that differ in nothing else."""
    return [(same[0], same[-1])] if same[0].kv_reads < same[-1].kv_reads else []
