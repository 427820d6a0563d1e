"""Makes tables of the figures, in Markdown, CSV and JSON."""

from __future__ import annotations

import csv as csv_format
import json as json_format
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.modes import MODES
from sglang_shift.tools.benchmark import goals, plots
from sglang_shift.tools.benchmark.figures import (
    BASELINES,
    COMPLETED,
    OF_GROUPS,
    OUTCOMES,
    SHIFT,
    Comparison,
    Limits,
    Spread,
    best_of,
    digits,
)
from sglang_shift.tools.benchmark.records import TRACES, Visit

_TIMES = ("ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "e2e_p99")
_GAPS = ("gap_p50", "gap_p99", "gap_max")
_MEANS = ("ttft_mean", "gap_mean", "e2e_mean")
_TRAFFIC = (
    *_TIMES,
    *_GAPS,
    *(COMPLETED, "total_tokens_per_s", "output_tokens_per_s", "goodput", "goodput_share"),
    *("cached_share", "kv_max", "queue_max"),
)


def _latency(metric: str) -> str:
    name, _, statistic = metric.partition("_")
    return f"{name if name == 'gap' else name.upper()} {statistic}"


ROWS = {
    "single": ("ttft_p50", "tpot_p50", "e2e_p50", *_GAPS),
    "saturated": ("total_tokens_per_s", "output_tokens_per_s", *_GAPS),
    "rate": ("ttft_p50", "ttft_p99", "tpot_p50", *_GAPS, COMPLETED, "total_tokens_per_s", "goodput"),
    "closed-loop": (COMPLETED, *_TIMES, *_GAPS),
    "long-prompts": (*_MEANS, *_TRAFFIC),
    **dict.fromkeys(("bursty", "long-mix", "mixed-lengths", "day", *TRACES), _TRAFFIC),
}
"""The metrics in the table of each kind of workload."""

LABELS = {name: (f"{_latency(name)}, ms", 1e3) for name in (*_TIMES, *_GAPS, *_MEANS)} | {
    COMPLETED: ("completed tokens/s in the window", 1.0),
    "total_tokens_per_s": ("total tokens/s", 1.0),
    "output_tokens_per_s": ("output tokens/s", 1.0),
    "goodput": ("goodput, requests/s", 1.0),
    "goodput_share": ("good requests, %", 100.0),
    "cached_share": ("cached prompt tokens, %", 100.0),
    "kv_max": ("KV usage max, %", 100.0),
    "queue_max": ("queue max, requests", 1.0),
    "exchanged_bytes": ("exchanged, MiB", 2.0**-20),
    "requests": ("requests", 1.0),
    "rejected": ("rejected requests", 1.0),
    "unfinished": ("unfinished requests", 1.0),
    "errors": ("failed requests", 1.0),
    "merges": ("merges", 1.0),
    "splits": ("splits", 1.0),
    "failed_changes": ("changes that were given up", 1.0),
}
"""The label of each metric, and the factor from the metric to the unit in the label."""

LEVEL = "at_level_"
CHANGES = ("merges", "splits", "failed_changes")
_CHANGE_TIME = ("merge_", "split_")


def label(metric: str) -> tuple[str, float]:
    """Return the label of a metric, and the factor from the metric to the unit in the label."""
    group, _, name = metric.rpartition("/")
    if group:
        text, factor = LABELS[name]
        return f"{group}: {text}", factor
    if metric.startswith(LEVEL):
        return f"time at level {metric.removeprefix(LEVEL)}, %", 100.0
    if metric.startswith(_CHANGE_TIME):
        kind, *phase = metric.removesuffix("_s").split("_")
        return f"{kind}{': ' if phase else ''}{'_'.join(phase)}, ms", 1e3
    return LABELS[metric]


def extra_metrics(comparison: Comparison, workload: str) -> list[str]:
    """Return the metrics of a workload that only some servers or workloads have: by group, and of instances."""
    visits = [v for v in comparison.visits if v.workload == workload]
    names = dict.fromkeys(name for v in visits for name in comparison.figures(v))
    groups = dict.fromkeys(name.partition("/")[0] for name in names if "/" in name)
    of_groups = [f"{group}/{name}" for group in groups for name in (*OUTCOMES, *OF_GROUPS)]
    levels = sorted((name for name in names if name.startswith(LEVEL)), key=lambda n: int(n.removeprefix(LEVEL)))
    times = sorted(name for name in names if name.startswith(_CHANGE_TIME))
    return [*of_groups, *levels, *CHANGES, *times]


@dataclass(frozen=True)
class Target:
    """A target of the project: a bound on ``shift``'s metric over the best metric of other contenders.

    The ratio is taken within a round, and the bound holds at every workload of the kind.

    Attributes:
        kind: The kind of the workloads.
        metric: A metric of :func:`~sglang_shift.tools.benchmark.figures.figures`.
        others: The other contenders.
        bound: The least ratio if a higher metric is better, or else the largest ratio.
    """

    kind: str
    metric: str
    others: tuple[str, ...]
    bound: float

    def __str__(self) -> str:
        name = LABELS[self.metric][0].partition(",")[0]
        than = "the best of " * (len(self.others) > 1) + ", ".join(map(_code, self.others))
        return f"{name} {'>=' if self.at_least else '<='} {self.bound:g} x {than}"

    @property
    def at_least(self) -> bool:
        """Whether a higher metric is better."""
        return best_of(self.metric) is max

    def met(self, ratio: float) -> bool:
        """Return whether a ratio reaches the bound."""
        return ratio >= self.bound if self.at_least else ratio <= self.bound


TARGETS = (
    Target("single", "ttft_p50", BASELINES, 1.02),
    Target("single", "tpot_p50", ("stock-tp",), 1.02),
    Target("saturated", "total_tokens_per_s", ("stock-tp",), 1.5),
    Target("saturated", "total_tokens_per_s", ("stock-dp",), 0.9),
    *(Target("rate", metric, BASELINES, 1.03) for metric in ("ttft_p50", "tpot_p50")),
    *(Target(kind, metric, BASELINES, 1.0) for kind in TRACES for metric in ("e2e_p50", "e2e_p99")),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a target is met at a workload.

    Attributes:
        target: The target in words.
        workload: The name of the workload, or the kind of workload if none was measured.
        ratio: The ratio, or None if there is no ratio.
        is_met: Whether the target is met, or None if this cannot be judged.
        note: Why there is no ratio, or what else a reader should know.
    """

    target: str
    workload: str
    ratio: Spread | None
    is_met: bool | None
    note: str = ""


def verdicts(comparison: Comparison) -> list[Verdict]:
    """Judge all targets at all workloads. The median ratio counts."""
    result = []
    for target in TARGETS:
        workloads = comparison.of_kind(target.kind)
        result += [_verdict(comparison, target, w) for w in workloads]
        if not workloads:
            result.append(Verdict(str(target), target.kind, None, None, "not measured"))
    return result


def _verdict(comparison: Comparison, target: Target, workload: str) -> Verdict:
    missing = [c for c in (SHIFT, *target.others) if not comparison.has_visit(c, workload)]
    if missing:
        return Verdict(str(target), workload, None, None, f"no visit of {', '.join(map(_code, missing))}")
    failed = int(sum(comparison.values(SHIFT, workload, "errors").values()))
    note = f"{failed} failed requests of {_code(SHIFT)}" if failed else ""
    ratio = comparison.ratio(SHIFT, target.others, workload, target.metric)
    if ratio is not None:
        return Verdict(str(target), workload, ratio, target.met(ratio.median), note)
    own, *others = (comparison.values(c, workload, target.metric) for c in (SHIFT, *target.others))
    if failed and not own and any(others):
        return Verdict(str(target), workload, None, False, note)
    return Verdict(str(target), workload, None, None, "no round in which all have this figure")


def targets_table(comparison: Comparison) -> str:
    """Return the targets with their ratios as a Markdown table.

    Below the table is a list of the targets that cannot be judged, with the reasons.
    """
    every = verdicts(comparison)
    lines = ["| target | workload | got | |", "| --- | --- | --: | --- |"]
    for o in every:
        if o.is_met is not None:
            verdict = ("met" if o.is_met else "**missed**") + (f"; {o.note}" if o.note else "")
            lines.append(f"| {o.target} | {_code(o.workload)} | {_ratio(o.ratio)} | {verdict} |")
    left_out = [f"- {_code(o.workload)}: {o.note} ({o.target})." for o in every if o.is_met is None]
    lines = lines if len(lines) > 2 else ["No target can be judged."]
    return "\n".join(lines + (["", "Left out:", "", *left_out] if left_out else [])) + "\n"


def tables(comparison: Comparison) -> str:
    """Return a Markdown table for each kind of workload that was measured."""
    parts = []
    for kind, metrics in ROWS.items():
        if workloads := comparison.of_kind(kind):
            lines = [line for workload in workloads for line in _rows(comparison, workload, metrics)]
            parts.append("\n".join([f"## {kind}", "", *_head(comparison), *lines]) + "\n")
    return "\n".join(parts)


def _others(comparison: Comparison) -> list[str]:
    """Return the baselines with which a column of ratios compares ``shift``."""
    return [c for c in BASELINES if c in comparison.contenders] if SHIFT in comparison.contenders else []


def _head(comparison: Comparison) -> list[str]:
    names = [_code(c) for c in comparison.contenders] + [f"{_code(SHIFT)} / best baseline"] * bool(_others(comparison))
    return ["| workload | | " + " | ".join(names) + " |", "| --- | --- |" + " --: |" * len(names)]


def _rows(comparison: Comparison, workload: str, metrics: Sequence[str]) -> list[str]:
    others = _others(comparison)
    rows = []
    for metric in (*metrics, *extra_metrics(comparison, workload), "exchanged_bytes", *OUTCOMES[1:]):
        spreads = [comparison.spread(c, workload, metric) for c in comparison.contenders]
        if not any(spreads) or (metric.endswith("errors") and not any(s.high for s in spreads if s)):
            continue
        text, factor = label(metric)
        best = best_of(metric)
        medians = [s.median for s in spreads if s]
        winner = best(medians) if best and len(medians) > 1 else None
        cells = [_cell(s, factor, s is not None and s.median == winner) for s in spreads]
        if others:
            cells.append(_ratio(comparison.ratio(SHIFT, others, workload, metric)) if best else "")
        rows.append([text, *cells])
    steps = [[comparison.spread(c, workload, f"{mode}_steps") for mode in MODES] for c in comparison.contenders]
    if any(map(any, steps)):
        cells = [
            " / ".join(f"{s.median:.0f}" if s else "-" for s in by_mode) if any(by_mode) else "-" for by_mode in steps
        ]
        rows.append([f"steps {' / '.join(mode.name for mode in MODES)}", *cells, *[""] * bool(others)])
    return [f"| {_code(workload) if i == 0 else ''} | " + " | ".join(row) + " |" for i, row in enumerate(rows)]


def _cell(spread: Spread | None, factor: float, bold: bool) -> str:
    if spread is None:
        return "-"
    values = [value * factor for value in (spread.median, spread.low, spread.high)]
    whole = all(value == int(value) for value in values)
    decimals = 0 if whole else digits(values[0] or values[2])
    middle, low, high = (f"{value:.{decimals}f}" for value in values)
    return (f"**{middle}**" if bold else middle) + (f" ({low} to {high})" if spread.rounds > 1 else "")


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.3f}" + (f" ({spread.low:.3f} to {spread.high:.3f})" if spread.rounds > 1 else "")


def _code(name: str) -> str:
    """Return a name as it stands in a Markdown table."""
    return "`" + " ".join(name.split()).replace("`", "'").replace("|", "\\|") + "`"


def csv(comparison: Comparison) -> str:
    """Return a row for each visit, with all its figures. Times are in seconds."""
    rows = _visit_rows(comparison)
    columns = dict.fromkeys(name for row in rows for name in row)
    text = StringIO()
    writer = csv_format.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json(comparison: Comparison, heading: dict[str, Any], limits: Limits | None = None) -> str:
    """Return as JSON the figures of every visit, the figures over the rounds, and the verdicts on the targets.

    The figures over the rounds are by contender and workload.
    """
    metrics = dict.fromkeys(name for visit in comparison.visits for name in comparison.figures(visit))
    summary = {
        c: {
            w: {m: asdict(s) for m in metrics if (s := comparison.spread(c, w, m)) is not None}
            for w in comparison.workloads
            if comparison.has_visit(c, w)
        }
        for c in comparison.contenders
    }
    value = {
        "heading": heading,
        "limits": asdict(limits or Limits()),
        "targets": [_target_row(verdict) for verdict in verdicts(comparison)],
        "summary": summary,
        "visits": _visit_rows(comparison),
    }
    return json_format.dumps(value, indent=1) + "\n"


def _target_row(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict with the names that results.json has for its values."""
    names = {"ratio": "got", "is_met": "met"}
    return {names.get(name, name): value for name, value in asdict(verdict).items()}


def _visit_rows(comparison: Comparison) -> list[dict[str, Any]]:
    names = ("contender", "workload", "kind", "x", "round", "started", "load_average")
    return [{name: getattr(v, name) for name in names} | comparison.figures(v) for v in comparison.visits]


def markdown(comparison: Comparison, heading: dict[str, Any], limits: Limits | None = None) -> str:
    """Return the heading, the targets, the tables, and notes on how to read the tables."""
    good = [f"{name.upper()} {s:g} s" for name, s in asdict(limits or Limits()).items() if s is not None]
    notes = [
        "Median over the rounds (min to max). Bold: the best median. Tokens/s and goodput: higher is better; times: "
        "lower. Ratios are taken within a round, to the best of the baselines there, and then their median. "
        "Latencies are of requests that did not fail. Steps: median over the rounds.",
        *(
            ["Completed tokens/s: those of requests that ended in the steady window, which is the same for all."]
            if any(v.window for v in comparison.visits)
            else []
        ),
        *([f"Goodput: requests/s within {', '.join(good)}."] if good else []),
    ]
    parts = [
        "\n".join(_facts(heading)),
        "## Targets\n\n" + targets_table(comparison).rstrip(),
        *([f"## Goals of instances\n\n{text}"] if (text := goals.table(comparison)) else []),
        tables(comparison).rstrip(),
        *notes,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(heading: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in heading.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {name}:", *_facts(value, indent + "  ")]
        elif "\n" in str(value):  # a block of code keeps its lines
            lines += [f"{indent}- {name}:", "", *(f"{indent}      {line}" for line in str(value).splitlines()), ""]
        else:
            lines += [f"{indent}- {name}: {value}"]
    return lines


def write(folder: Path, visits: Iterable[Visit], heading: dict[str, Any], limits: Limits | None = None) -> str:
    """Write results.md, results.csv, results.json and, if matplotlib is installed, plots into ``folder``.

    Args:
        folder: The folder. It is made if it does not exist.
        visits: All visits of the campaign.
        heading: What was measured, and on which machine, as JSON values. A dict in it becomes a nested list.
        limits: The limits for the goodput. None means no goodput.

    Returns:
        The text of results.md.
    """
    comparison = Comparison(visits, limits)
    try:
        pictures = [f"![{path.stem}]({path.relative_to(folder)})" for path in plots.write(comparison, folder / "plots")]
    except ShiftError as error:
        pictures = [f"No plots: {error}."]
    text = markdown(comparison, heading, limits) + "".join(f"\n{line}\n" for line in pictures)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text)
    (folder / "results.csv").write_text(csv(comparison))
    (folder / "results.json").write_text(json(comparison, heading, limits))
    return text
