"""Numbers of the records: of one visit, and over the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import fmean, median

import numpy as np

from sglang_shift.tools.benchmark.records import KINDS, RequestRecord, Sample, Visit

SHIFT = "shift"
BASELINES = ("stock-tp", "stock-dp", "sp")
"""The contenders that the targets of the project compare ``shift`` with."""

LATENCIES = ("ttft", "tpot", "itl", "e2e")
PERCENTS = (50, 90, 99)
STATISTICS = ("mean", *(f"p{percent}" for percent in PERCENTS))

LOWER_IS_BETTER = frozenset(f"{latency}_{statistic}" for latency in LATENCIES for statistic in STATISTICS)
HIGHER_IS_BETTER = frozenset(
    ("requests_per_s", "total_tokens_per_s", "output_tokens_per_s", "goodput", "goodput_share")
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a request must meet to count as good: at most so many seconds; None does not limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, request: RequestRecord) -> bool:
        """Whether a request that did not fail is good. A single token meets any limit of the TPOT."""
        values = ((request.ttft, self.ttft), (request.tpot, self.tpot), (request.latency, self.e2e))
        return all(value is None or limit is None or value <= limit for value, limit in values)

    def __bool__(self) -> bool:
        return (self.ttft, self.tpot, self.e2e) != (None, None, None)


def figures(visit: Visit, limits: Limits | None = None) -> dict[str, float]:
    """The figures of a visit by name; one that it does not have, such as a TPOT of single tokens, is left out.

    Requests that failed count in ``requests`` and ``errors`` only, and are never good.

    Returns:
        ``{ttft,tpot,itl,e2e}_{mean,p50,p90,p99}``: seconds; percentiles interpolate linearly between
            the two closest values, as numpy's do by default. ITLs are those of all requests together.
        ``requests_per_s``, ``total_tokens_per_s`` (prompt and output), ``output_tokens_per_s``: of
            the requests that did not fail, over the seconds of the visit.
        ``goodput``, ``goodput_share``: requests/s that met ``limits``, and their share of all that were sent.
        ``requests``, ``errors``, ``seconds``: of the visit.
        ``cached_share``: of the prompt tokens.
        ``kv_mean``, ``kv_max``, ``queue_mean``, ``queue_max``: over the samples; a share, and requests.
        All of ``visit.shift``.
    """
    served = [r for r in visit.requests if not r.error]
    found: dict[str, float] = {
        "seconds": visit.seconds,
        "requests": len(visit.requests),
        "errors": len(visit.requests) - len(served),
    }
    found |= _latencies(served) | _rates(visit, served, limits or Limits()) | _states(visit.samples)
    prompt_tokens = sum(r.prompt for r in served)
    if prompt_tokens:
        found["cached_share"] = sum(r.cached for r in served) / prompt_tokens
    return found | (visit.shift or {})


def _latencies(served: Sequence[RequestRecord]) -> dict[str, float]:
    values = {
        "ttft": [r.ttft for r in served],
        "tpot": [r.tpot for r in served if r.tpot is not None],
        "itl": [seconds for r in served for seconds in r.itl],
        "e2e": [r.latency for r in served],
    }
    found: dict[str, float] = {}
    for name, seconds in values.items():
        if seconds:
            quantiles = np.percentile(seconds, PERCENTS).tolist()
            found |= {f"{name}_p{percent}": value for percent, value in zip(PERCENTS, quantiles, strict=True)}
            found[f"{name}_mean"] = fmean(seconds)
    return found


def _rates(visit: Visit, served: Sequence[RequestRecord], limits: Limits) -> dict[str, float]:
    output = sum(r.output for r in served)
    amounts: dict[str, float] = {
        "requests_per_s": len(served),
        "total_tokens_per_s": output + sum(r.prompt for r in served),
        "output_tokens_per_s": output,
    }
    if limits:
        amounts["goodput"] = sum(limits.met(r) for r in served)
    rates = {name: amount / visit.seconds if visit.seconds else 0.0 for name, amount in amounts.items()}
    if limits and visit.requests:
        rates["goodput_share"] = amounts["goodput"] / len(visit.requests)
    return rates


def _states(samples: Sequence[Sample]) -> dict[str, float]:
    values = {
        "kv": [s.kv_usage for s in samples if s.kv_usage is not None],
        "queue": [s.waiting for s in samples if s.waiting is not None],
    }
    found: dict[str, float] = {}
    for name, numbers in values.items():
        if numbers:
            found |= {f"{name}_mean": fmean(numbers), f"{name}_max": max(numbers)}
    return found


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds that have it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of ``values``; None of nothing."""
        return cls(median(values), min(values), max(values), len(values)) if values else None


class Comparison:
    """The figures of all visits. Of visits of the same contender, workload and round, the last counts.

    Args:
        visits: In any order.
        limits: For the goodput; None for no goodput.

    Attributes:
        visits: Those that count.
        contenders: In the order of their first visits.
        workloads: Name to kind: in the order of :data:`~sglang_shift.tools.benchmark.records.KINDS`, then of ``x``.
        x: Of the workloads that have one, in the same order.
    """

    def __init__(self, visits: Iterable[Visit], limits: Limits | None = None) -> None:
        by_key = {(v.workload, v.contender, v.round): v for v in visits}
        self.visits = list(by_key.values())
        self.contenders = list(dict.fromkeys(v.contender for v in self.visits))
        ordered = sorted(self.visits, key=lambda v: (KINDS.index(v.kind), v.x or 0.0))
        self.workloads = {v.workload: v.kind for v in ordered}
        self.x = {v.workload: v.x for v in ordered if v.x is not None}
        self._figures = {key: figures(v, limits) for key, v in by_key.items()}

    def of_kind(self, kind: str) -> list[str]:
        """The workloads of a kind."""
        return [w for w, k in self.workloads.items() if k == kind]

    def figures(self, visit: Visit) -> dict[str, float]:
        """Those of one of :attr:`visits`."""
        return self._figures[visit.workload, visit.contender, visit.round]

    def visited(self, contender: str, workload: str) -> bool:
        """Whether there is such a visit."""
        return any((w, c) == (workload, contender) for w, c, _ in self._figures)

    def values(self, contender: str, workload: str, metric: str) -> dict[int, float]:
        """The figure by round; rounds without it are left out."""
        mine = {r: f for (w, c, r), f in self._figures.items() if (w, c) == (workload, contender)}
        return {r: f[metric] for r, f in sorted(mine.items()) if metric in f}

    def spread(self, contender: str, workload: str, metric: str) -> Spread | None:
        """The figure over the rounds; None if no round has it."""
        return Spread.of(list(self.values(contender, workload, metric).values()))

    def ratio(self, contender: str, others: Sequence[str], workload: str, metric: str) -> Spread | None:
        """The contender's figure over the best of the others', taken within a round: what else the machine
        did in this round hit all of them alike.

        Others that have the figure in no round do not count; rounds in which one of the rest lacks it are
        left out, for the best of fewer is easier to beat. None if no round is left, or none with a best
        above 0.

        Raises:
            ValueError: there are several others, and the metric is neither the better for being high nor low.
        """
        if len(others) > 1 and best_of(metric) is None:
            raise ValueError(f"{metric} has no best: compare with one contender")
        best = best_of(metric) or max  # of a single one
        mine = self.values(contender, workload, metric)
        theirs = [values for other in others if (values := self.values(other, workload, metric))]
        rounds = [r for r in mine if theirs and all(r in values for values in theirs)]
        bests = {r: best(values[r] for values in theirs) for r in rounds}
        return Spread.of([mine[r] / bests[r] for r in rounds if bests[r] > 0])


def best_of(metric: str) -> Callable[[Iterable[float]], float] | None:
    """``min`` or ``max``, whichever finds the best of a metric; None where neither is better."""
    return min if metric in LOWER_IS_BETTER else max if metric in HIGHER_IS_BETTER else None


def digits(value: float) -> int:
    """Decimals that show three significant figures of a value of at least 0, but 3 at most."""
    return min(3, max(0, 2 - floor(log10(value)))) if value else 0
