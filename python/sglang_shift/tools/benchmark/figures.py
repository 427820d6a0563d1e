"""Computes figures from the records: figures of one visit, and figures over the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import fmean, median

import numpy as np

from sglang_shift.tools.benchmark.records import KINDS, InstanceChange, RequestRecord, Sample, Visit

SHIFT = "shift"
BASELINES = ("stock-tp", "stock-dp", "sp")
"""The contenders that the targets of the project compare ``shift`` with."""

LATENCIES = ("ttft", "tpot", "itl", "gap", "e2e")
PERCENTS = (50, 90, 99)
STATISTICS = ("mean", *(f"p{percent}" for percent in PERCENTS))

LOWER_IS_BETTER = frozenset(
    [*(f"{latency}_{statistic}" for latency in LATENCIES for statistic in STATISTICS), "gap_max"]
)
HIGHER_IS_BETTER = frozenset(
    ("requests_per_s", "total_tokens_per_s", "output_tokens_per_s", "goodput", "goodput_share")
)  # fmt: skip
COMPLETED = "completed_tokens_per_s"
"""The throughput in the steady window. A visit without a window lacks it."""

GROUP = "{group}/{metric}"
"""The name of a figure of the requests of a group."""
OF_GROUPS = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99")
OUTCOMES = ("requests", "rejected", "unfinished", "errors")


@dataclass(frozen=True)
class Limits:
    """The limits that a request must meet to count as good, in seconds. None means no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, request: RequestRecord) -> bool:
        """Return whether a request that did not fail is good. A single token meets any limit of the TPOT."""
        values = ((request.ttft, self.ttft), (request.tpot, self.tpot), (request.latency, self.e2e))
        return all(value is None or limit is None or value <= limit for value, limit in values)

    def __bool__(self) -> bool:
        return (self.ttft, self.tpot, self.e2e) != (None, None, None)


def figures(visit: Visit, limits: Limits | None = None) -> dict[str, float]:
    """Compute the figures of a visit, by name. A figure that the visit lacks is left out.

    For example, a visit whose requests have single output tokens lacks the TPOT. Requests that failed count only in
    ``requests`` and ``errors``, and are never good. The same holds for those that were rejected or did not end in time:
    they count in ``rejected`` or ``unfinished`` instead of ``errors``.

    Returns:
        ``{ttft,tpot,itl,gap,e2e}_{mean,p50,p90,p99}``, ``gap_max``: Seconds. Percentiles interpolate linearly between
            the two closest values, as numpy's percentiles do by default. The ITLs of all requests are taken together,
            and so are their gaps. A gap is the time between two deliveries of tokens. Several tokens that come
            together have one gap, but an ITL each.
        ``requests_per_s``, ``total_tokens_per_s`` (prompt and output), ``output_tokens_per_s``: Amounts of the
            requests that did not fail, over the seconds of the visit.
        ``completed_tokens_per_s``: Prompt and output tokens of the requests that ended in the steady window, over its
            length.
        ``goodput``, ``goodput_share``: Requests/s that met ``limits``, and the share of such requests in all requests.
        ``requests``, ``errors``, ``rejected``, ``unfinished``, ``seconds``: Requests and seconds of the visit.
        ``GROUP/METRIC``: Some latencies and all numbers of requests of each group, such as ``long/ttft_p50``.
        ``cached_share``: The share of the prompt tokens that was cached.
        ``kv_mean``, ``kv_max``: The share of the KV pool in use, over the samples.
        ``queue_mean``, ``queue_max``: The requests in the queue, over the samples.
        ``at_level_K``: The share of the ranks that were at level K of instances, over the samples.
        ``merges``, ``splits``, ``failed_changes``: Changes of instances.
        ``merge_s``, ``merge_PHASE_s``, ``split_s``, ``split_PHASE_s``: Mean seconds of a merge or split, and of a phase
            of it.
        All entries of ``visit.shift``.
    """
    served = [r for r in visit.requests if not r.error]
    result: dict[str, float] = {"seconds": visit.seconds} | _outcomes(visit.requests)
    result |= _latencies(served) | _rates(visit, served, limits or Limits()) | _states(visit.samples)
    result |= _groups(visit.requests) | _levels(visit.samples) | _changes(visit.changes)
    prompt_tokens = sum(r.prompt for r in served)
    if prompt_tokens:
        result["cached_share"] = sum(r.cached for r in served) / prompt_tokens
    return result | (visit.shift or {})


def _outcomes(requests: Sequence[RequestRecord]) -> dict[str, float]:
    """Return how many requests there are, and how many ended otherwise than with an answer."""
    others = {"rejected": sum(r.rejected for r in requests), "unfinished": sum(r.unfinished for r in requests)}
    counts: dict[str, float] = {"requests": len(requests), "errors": sum(r.failed for r in requests)}
    return counts | {name: count for name, count in others.items() if count}


def _groups(requests: Sequence[RequestRecord]) -> dict[str, float]:
    result: dict[str, float] = {}
    for group in dict.fromkeys(r.group for r in requests if r.group):
        mine = [r for r in requests if r.group == group]
        latencies = _latencies([r for r in mine if not r.error])
        values = _outcomes(mine) | {name: latencies[name] for name in OF_GROUPS if name in latencies}
        result |= {GROUP.format(group=group, metric=name): value for name, value in values.items()}
    return result


def _levels(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the share of the ranks at each level. All samples are equally far apart."""
    shares = [{level: n / sum(s.levels.values()) for level, n in s.levels.items()} for s in samples if s.levels]
    levels = sorted({level for share in shares for level in share})
    return {f"at_level_{level}": fmean(share.get(level, 0.0) for share in shares) for level in levels}


def _changes(changes: Sequence[InstanceChange]) -> dict[str, float]:
    if not changes:
        return {}
    kinds = {"merge": [c for c in changes if c.ok and c.merges], "split": [c for c in changes if c.ok and not c.merges]}
    result: dict[str, float] = {"failed_changes": sum(not c.ok for c in changes)}
    for kind, made in kinds.items():
        result[f"{kind}s"] = len(made)
        if made:
            result[f"{kind}_s"] = fmean(sum(c.phases.values()) for c in made)
        for phase in dict.fromkeys(phase for c in made for phase in c.phases):
            result[f"{kind}_{phase}_s"] = fmean(c.phases.get(phase, 0.0) for c in made)
    return result


def _latencies(served: Sequence[RequestRecord]) -> dict[str, float]:
    values = {
        "ttft": [r.ttft for r in served],
        "tpot": [r.tpot for r in served if r.tpot is not None],
        "itl": [seconds for r in served for seconds in r.itl],
        "gap": [seconds for r in served for seconds in r.gaps],
        "e2e": [r.latency for r in served],
    }
    figures: dict[str, float] = {}
    for name, seconds in values.items():
        if seconds:
            quantiles = np.percentile(seconds, PERCENTS).tolist()
            figures |= {f"{name}_p{percent}": value for percent, value in zip(PERCENTS, quantiles, strict=True)}
            figures[f"{name}_mean"] = fmean(seconds)
    if values["gap"]:
        figures["gap_max"] = max(values["gap"])
    return figures


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
    if visit.window is not None:
        begin, end = visit.window
        rates[COMPLETED] = sum(r.prompt + r.output for r in served if begin <= r.end < end) / (end - begin)
    if limits and visit.requests:
        rates["goodput_share"] = amounts["goodput"] / len(visit.requests)
    return rates


def _states(samples: Sequence[Sample]) -> dict[str, float]:
    values = {
        "kv": [s.kv_usage for s in samples if s.kv_usage is not None],
        "queue": [s.waiting for s in samples if s.waiting is not None],
    }
    figures: dict[str, float] = {}
    for name, numbers in values.items():
        if numbers:
            figures |= {f"{name}_mean": fmean(numbers), f"{name}_max": max(numbers)}
    return figures


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds that have it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of ``values``, or None if there are no values."""
        return cls(median(values), min(values), max(values), len(values)) if values else None


class Comparison:
    """The figures of all visits.

    If several visits have the same contender, workload and round, the last visit counts.

    Args:
        visits: The visits in any order.
        limits: The limits for the goodput. None means no goodput.

    Attributes:
        visits: The visits that count.
        contenders: The names of the contenders, in the order of their first visits.
        workloads: The kind of each workload by its name. The order is that of
            :data:`~sglang_shift.tools.benchmark.records.KINDS`, then that of ``x``.
        x: The ``x`` of each workload that has one, in the same order.
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
        """Return the workloads of a kind."""
        return [w for w, k in self.workloads.items() if k == kind]

    def figures(self, visit: Visit) -> dict[str, float]:
        """Return the figures of one of :attr:`visits`."""
        return self._figures[visit.workload, visit.contender, visit.round]

    def has_visit(self, contender: str, workload: str) -> bool:
        """Return whether a workload has visited a contender."""
        return any((w, c) == (workload, contender) for w, c, _ in self._figures)

    def values(self, contender: str, workload: str, metric: str) -> dict[int, float]:
        """Return the figure by round. Rounds without the figure are left out."""
        own = {r: f for (w, c, r), f in self._figures.items() if (w, c) == (workload, contender)}
        return {r: f[metric] for r, f in sorted(own.items()) if metric in f}

    def spread(self, contender: str, workload: str, metric: str) -> Spread | None:
        """Return the figure over the rounds, or None if no round has the figure."""
        return Spread.of(list(self.values(contender, workload, metric).values()))

    def ratio(self, contender: str, others: Sequence[str], workload: str, metric: str) -> Spread | None:
        """Return the contender's figure over the best figure of the others.

        The ratio is taken within a round, because other work of the machine in this round slows down all contenders
        alike. A contender without the figure in any round does not count. A round in which one of the remaining
        contenders lacks the figure is left out, because the best of fewer contenders is easier to beat. The result is
        None if no round is left, or if no best figure is above 0.

        Raises:
            ValueError: there are several others, and neither a high nor a low value of the metric is better.
        """
        if len(others) > 1 and best_of(metric) is None:
            raise ValueError(f"{metric} has no best: compare with one contender")
        best = best_of(metric) or max  # of a single value, both give the value
        own = self.values(contender, workload, metric)
        other_values = [values for other in others if (values := self.values(other, workload, metric))]
        rounds = [r for r in own if other_values and all(r in values for values in other_values)]
        bests = {r: best(values[r] for values in other_values) for r in rounds}
        return Spread.of([own[r] / bests[r] for r in rounds if bests[r] > 0])


def best_of(metric: str) -> Callable[[Iterable[float]], float] | None:
    """Return ``min`` or ``max``, whichever finds the best value of a metric; None if neither is better."""
    metric = metric.rpartition("/")[2]
    return min if metric in LOWER_IS_BETTER else max if metric in (*HIGHER_IS_BETTER, COMPLETED) else None


def digits(value: float) -> int:
    """Return the decimals that show three significant figures of a value of at least 0. There are 3 at most."""
    return min(3, max(0, 2 - floor(log10(value)))) if value else 0
