"""Draws the figures as PNG files. This needs matplotlib, which is optional."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, pairwise
from math import ceil, isinf, nan
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_shift.modes import MODES
from sglang_shift.tools.benchmark.figures import BASELINES, SHIFT, Comparison, Spread, digits
from sglang_shift.tools.benchmark.records import Sample, Visit
from sglang_shift.tools.plotting import DPI, STYLES, Style, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEGEND_CHARACTERS = 90
"""Number of characters that fit into a line."""

ARRIVAL_BINS = 80
MAX_LABELLED_BARS = 6
"""The most bars of a panel. With more bars, numbers do not fit above them."""

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}

OTHERS: list[Style] = [
    {"color": color, "marker": "vPX*"[(i + turn) % 4]}
    for turn in range(4)
    for i, color in enumerate(("#E69F00", "#56B4E9", "#000000", "#F0E442", "#882255", "#8C6D31"))
]
SHADES = ("#C8C8C8", "#6E6E6E", "#A0A0A0", "#404040")
"""Greys, because no contender has a grey colour."""


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all plots that the visits allow.

    Returns:
        The files. There are none if there is nothing to plot.

    Raises:
        ShiftError: matplotlib is not installed.
    """
    paths: list[Path] = []
    for name, figure in _figures(comparison):
        stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        path = folder / f"{len(paths) + 1:02d}-{stem}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        paths.append(path)
    return paths


def _figures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    if figure := latency_against_throughput(comparison):
        yield "rates", figure
    if figure := by_prompt_length(comparison):
        yield "prompt-lengths", figure
    for workload, kind in comparison.workloads.items():
        if kind not in ("single", "saturated", "rate"):
            if figure := bars(comparison, workload):
                yield workload, figure
            if pair := _visits_to_watch(comparison, workload):
                yield f"{workload}-timeline", timeline(*pair, styles(comparison.contenders))


def _visits_to_watch(comparison: Comparison, workload: str) -> tuple[Visit, Visit | None] | None:
    """Return the first visit of ``shift``, and the visit of a baseline in the same round."""
    visits = {(v.round, v.contender): v for v in comparison.visits if v.workload == workload}
    rounds = sorted(r for r, contender in visits if contender == SHIFT)
    if not rounds:
        return None
    others = (visits.get((rounds[0], contender)) for contender in BASELINES)
    return visits[rounds[0], SHIFT], next((v for v in others if v), None)


def styles(contenders: Sequence[str]) -> dict[str, Style]:
    """Return a colour and a marker for each contender. They are the same in all plots of these contenders."""
    others = [c for c in contenders if c not in STYLES]
    return {c: STYLES[c] if c in STYLES else OTHERS[others.index(c) % len(OTHERS)] for c in contenders}


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Add one legend below the axes, with all contenders of all axes."""
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        most = max(1, LEGEND_CHARACTERS // (max(map(len, handles)) + 6))
        columns = ceil(len(handles) / ceil(len(handles) / most))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _hint(ax: Axes, text: str) -> None:
    ax.set_title(text, fontsize=8, color="0.35")


def _log_scale(ax: Axes) -> None:
    """Make the y axis logarithmic after everything is drawn. Its numbers are such as 20 and 500, not powers of ten."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullLocator

    if isinf(ax.dataLim.minposy):  # nothing is drawn, because all requests failed
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(AutoLocator() if high < 10 * low else LogLocator(subs=(1, 2, 5), numticks=8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _whiskers(spreads: Iterable[Spread]) -> list[list[float]]:
    """Return the distances from the medians down to the lows and up to the highs, in ms."""
    pairs = [((s.median - s.low) * 1e3, (s.high - s.median) * 1e3) for s in spreads]
    return [list(side) for side in zip(*pairs, strict=True)]


def _thousands(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def latency_against_throughput(comparison: Comparison) -> Figure | None:
    """Draw median TTFT and TPOT over tokens/s, with a point for each contender and rate.

    The rates are marked for one contender only, because the marks of all contenders would cover each other. The result
    is None if there is nothing to show.
    """
    workloads = comparison.of_kind("rate")
    if not workloads:
        return None
    labelled_contender = SHIFT if any(comparison.has_visit(SHIFT, w) for w in workloads) else comparison.contenders[0]
    figure, axes = panels("Latency against throughput, by arrival rate (medians over the rounds)", 1, 2, 4.6)
    for ax, latency in zip(axes, ("ttft", "tpot"), strict=True):
        for contender, style in styles(comparison.contenders).items():
            points = []
            for workload in workloads:
                tokens = comparison.spread(contender, workload, "total_tokens_per_s")
                seconds = comparison.spread(contender, workload, f"{latency}_p50")
                if tokens and seconds:
                    points.append((tokens.median, seconds.median * 1e3))
                    if contender == labelled_contender:
                        _mark_rate(ax, comparison.x[workload], tokens.median, row=len(points) % 3)
            if points:
                ax.plot(*zip(*points, strict=True), label=contender, **style)
        ax.set_xlabel("prompt and output tokens/s")
        ax.set_ylabel(f"{LATENCIES[latency]} p50, ms")
        _hint(ax, f"lower and further right is better; grey: the rates of {labelled_contender}")
        ax.margins(0.12, 0.2)
        _log_scale(ax)
    _legend(figure, axes)
    return figure if figure.legends else None


def _mark_rate(ax: Axes, rate: float, x: float, row: int) -> None:
    """Mark a rate at the foot of the axes, below all points. Neighbours are in different rows."""
    ax.axvline(x, color="0.85", linewidth=0.8, zorder=0)
    where: Style = {"transform": ax.get_xaxis_transform(), "ha": "center", "fontsize": 8}
    ax.text(x, 0.015 + 0.04 * row, f"{rate:.3g}/s", **where)


def by_prompt_length(comparison: Comparison) -> Figure | None:
    """Draw median TTFT, TPOT and E2E of single requests over the prompt's length.

    The result is None if there is nothing to show.
    """
    workloads = comparison.of_kind("single")
    if not workloads:
        return None
    figure, axes = panels("One request at a time: p50 by prompt length (median, min to max over the rounds)", 1, 3, 4.2)
    for ax, (latency, name) in zip(axes, LATENCIES.items(), strict=True):
        for contender, style in styles(comparison.contenders).items():
            by_length = {comparison.x[w]: comparison.spread(contender, w, f"{latency}_p50") for w in workloads}
            spreads = {x: spread for x, spread in by_length.items() if spread}
            if spreads:
                middles = [s.median * 1e3 for s in spreads.values()]
                ax.errorbar(list(spreads), middles, _whiskers(spreads.values()), capsize=3, label=contender, **style)
        ax.set_xscale("log", base=2)
        ax.set_xticks([comparison.x[w] for w in workloads], [_thousands(comparison.x[w]) for w in workloads])
        _log_scale(ax)
        ax.set_xlabel("prompt tokens")
        ax.set_ylabel(f"{name} p50, ms")
        _hint(ax, "lower is better")
    _legend(figure, axes)
    return figure if figure.legends else None


def bars(comparison: Comparison, workload: str) -> Figure | None:
    """Draw p50 and p99 of TTFT, TPOT and E2E as bars, with a panel for each.

    The result is None if no request of the workload succeeded.
    """
    title = f"{workload}: latency (median, min to max over the rounds; lower is better)"
    figure, axes = panels(title, 2, 3, 5.4)
    metrics = [(f"{latency}_{p}", f"{name} {p}, ms") for p in ("p50", "p99") for latency, name in LATENCIES.items()]
    for ax, (metric, label) in zip(axes, metrics, strict=True):
        for i, (contender, style) in enumerate(styles(comparison.contenders).items()):
            spread = comparison.spread(contender, workload, metric)
            if spread:
                height = spread.median * 1e3
                ax.bar(i, height, color=style["color"], label=contender)
                if spread.rounds > 1:
                    ax.errorbar(i, height, _whiskers([spread]), color="black", capsize=3, linewidth=1)
                if len(comparison.contenders) <= MAX_LABELLED_BARS:
                    above: Style = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 7}
                    ax.annotate(f"{height:.{digits(height)}f}", (i, spread.high * 1e3), **above)
        ax.set_xticks([])
        ax.set_ylabel(label)
        ax.margins(y=0.15)
    _legend(figure, axes)
    figure.align_ylabels(axes)
    return figure if figure.legends else None


def timeline(visit: Visit, other: Visit | None, style: dict[str, Style]) -> Figure:
    """Draw a visit second by second: arrivals, the queue, the modes of the steps, and each request's TTFT.

    Args:
        visit: The visit of a contender.
        other: The visit of another contender by the same workload. Its TTFTs are hollow dots.
        style: The style of each contender.
    """
    title = f"{visit.workload}: {visit.contender}, second by second (round {visit.round})"
    figure, axes = panels(title, 4, 1, 8.0, sharex=True, height_ratios=(1, 1.2, 0.7, 2))
    arrivals, queue, modes, latency = axes
    _arrivals(arrivals, visit)
    times = [s.time for s in visit.samples]
    for name, line in (("running", "-"), ("waiting", "--")):
        values = [nan if (v := getattr(s, name)) is None else v for s in visit.samples]
        queue.plot(times, values, line, color="black", linewidth=1.2, label=name, drawstyle="steps-post")
    queue.set_ylabel("requests")
    queue.set_ylim(bottom=0)
    _mode_bands(modes, visit.samples)
    for v, filled in ((visit, True), *([(other, False)] if other else [])):
        _ttfts(latency, v, style[v.contender], filled)
    _log_scale(latency)
    latency.set_ylabel("TTFT, s (lower is better)")
    latency.set_xlabel("seconds from the start; TTFT over the time of arrival")
    for ax in (queue, modes, latency):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False, fontsize=9)
    figure.align_ylabels(axes)
    return figure


def _arrivals(ax: Axes, visit: Visit) -> None:
    due = [r.due for r in visit.requests]
    bins = [i * max(due, default=0.0) / ARRIVAL_BINS for i in range(ARRIVAL_BINS + 1)]
    width = bins[1] or 1.0
    ax.hist(due, bins if bins[1] else 1, weights=[1 / width] * len(due), color="0.45")
    ax.set_ylabel("arrivals,\nrequests/s")


def _mode_bands(ax: Axes, samples: Sequence[Sample]) -> None:
    """Draw the share of each mode in the steps since the last sample. If no step ran, the place is blank."""
    samples_with_steps = [s for s in samples if s.steps]
    spans = [{mode: b.steps[mode] - a.steps[mode] for mode in b.steps} for a, b in pairwise(samples_with_steps)]
    tops = [0.0 if any(span.values()) else nan for span in spans]
    for mode, shade in zip(MODES, cycle(SHADES), strict=False) if spans else ():
        below = tops
        tops = [low + span[mode] / (sum(span.values()) or nan) for low, span in zip(below, spans, strict=True)]
        ax.stairs(tops, [s.time for s in samples_with_steps], baseline=below, fill=True, color=shade, label=mode.name)
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
    ax.set_ylabel("steps, %")


def _ttfts(ax: Axes, visit: Visit, style: Style, filled: bool) -> None:
    served = [r for r in visit.requests if not r.error]
    failed = [r.due for r in visit.requests if r.error]
    face = style["color"] if filled else "none"
    x, y = [r.due for r in served], [r.ttft for r in served]
    ax.scatter(x, y, s=16, facecolors=face, edgecolors=style["color"], marker=style["marker"], label=visit.contender)
    if failed:
        at_the_foot = [0.02] * len(failed)
        where = {"transform": ax.get_xaxis_transform(), "marker": "x", "color": style["color"], "linestyle": ""}
        ax.plot(failed, at_the_foot, label=f"{visit.contender}, failed", **where)
