"""Makes the view that ``python -m sglang_shift.status`` shows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_shift.observe.summaries import PERCENTILES

STYLES = ("blue", "yellow", "magenta", "green", "cyan")
BLOCKS = "█▒▓░▚"
"""The colours and blocks of the modes, in the order of the server's family. A larger family repeats them."""
BAR = 28
"""Number of characters of a bar. With this number, the lines fit into 80 columns."""


def plain(value: object, style: str = "") -> Text:
    """Return ``value`` as text without markup, and without control characters that could reach the terminal."""
    return Text("".join(c if c.isprintable() else " " for c in str(value)), style)


def seconds(value: float | None) -> str:
    """Return a time with its unit."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f} s"
    return f"{_digits(value)} s" if value >= 1 else f"{_digits(1e3 * value)} ms"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def sparkline(values: Sequence[float | None], unicode: bool) -> str:
    """Return one character for each value. Its height is the value relative to the largest value."""
    marks = " ▁▂▃▄▅▆▇█" if unicode else " .:-=+*#@"
    top = max((v for v in values if v), default=0)
    return "".join(marks[math.ceil((v or 0) / top * 8) if top else 0] for v in values)


def mode_text(mode: str, modes: Sequence[str], rest: str = "") -> Text:
    """Return the name of ``mode`` and ``rest``, in the mode's colour."""
    return plain(mode.upper() + rest, STYLES[modes.index(mode) % len(STYLES)])


def view(data: dict[str, Any], url: str, problem: str = "", switches: int = 8, unicode: bool = True) -> RenderableType:
    """Return what the terminal shows.

    Args:
        data: The server's snapshot.
        url: The server's address.
        problem: Why ``data`` is old; empty if it is not old.
        switches: How many of the last switches to show.
        unicode: Whether the terminal can show block characters.
    """
    base = data["world_size"] // data["sp_size"]
    ranks = f"{data['world_size']} ranks: TP {data['world_size']} or SP {data['sp_size']}"
    title = Text.assemble(
        plain(data["model"], "bold"), f", {ranks}{f' x TP {base}' if base > 1 else ''}  ", plain(url, "dim")
    )
    policy = Text.assemble(plain(data["policy"], "bold"), ": ", plain(data["policy_text"]))
    bound = [_bound(data["tbt"])] if data.get("tbt") else []
    parts: list[RenderableType] = [
        title,
        policy,
        *bound,
        Text(),
        _now(data, unicode),
        Text(),
        _step_times(data),
        Text(),
    ]
    parts += [_requests(data), Text(), _switches(data, switches)]
    if dropped := data["events"]["dropped"]:
        parts.append(Text(f"{dropped:,} events dropped: these steps are missing here", "red"))
    if problem:
        parts.append(plain(f"{problem}; what is shown is old", "bold red"))
    elif (age := data["events"]["age"] or 0) > 10:
        parts.append(Text(f"no event has arrived from the scheduler for {seconds(age)}", "bold red"))
    return Group(*parts)


def _bound(tbt: dict[str, Any]) -> Text:
    chunks = tbt["chunks"]
    text = f"at most {seconds(tbt['target'])}"
    if chunks["count"]:
        text += (
            f"; steps with prompts beside decodes take {chunks['tokens']['p50']:,.0f} prompt tokens (median), "
            f"{chunks['room']['p50']:,.0f} could fit {seconds(chunks['budget']['p50'])}"
        )
    return Text.assemble(plain("gap between tokens", "bold"), ": ", text)


def _grid() -> Table:
    return Table(box=None, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 2, 0, 0))


def _now(data: dict[str, Any], unicode: bool) -> Table:
    minute, history, queue, totals = data["minute"], data["history"], data["queue"], data["totals"]
    modes: list[str] = data["modes"]
    bar, text = Text(" " * BAR, "dim"), "no step in the last minute"
    if steps := sum(minute["steps"].values()):
        busy = sum(minute["busy_seconds"].values())
        shares = {
            mode: minute["busy_seconds"][mode] / busy if busy else minute["steps"][mode] / steps for mode in modes
        }
        bar = _bar(shares, unicode)
        text = "; ".join(
            f"{mode.upper()} {shares[mode]:.0%} of the time, {minute['steps'][mode]:,} of {steps:,} steps"
            for mode in modes[1:]
        )
    tokens = [sum(of_second) for of_second in zip(*(history["tokens"][mode] for mode in modes), strict=True)]
    rate = {mode: sum(history["tokens"][mode][-10:]) / 10 for mode in modes}
    by_mode = ", ".join(f"{mode.upper()} {rate[mode]:,.0f}" for mode in modes)
    grid = _grid()
    for _ in range(3):
        grid.add_column(overflow="fold")
    waiting = history["max_waiting"][-BAR:]
    grid.show_header = False
    grid.add_row("Modes", bar, text)
    grid.add_row(
        "Throughput",
        sparkline(tokens[-BAR:], unicode),
        f"{sum(rate.values()):,.0f} tokens/s: {by_mode}",
    )
    grid.add_row(
        "Waiting",
        sparkline(waiting, unicode),
        f"{queue['waiting']:,} and {queue['running']:,} running; {queue['pending_tokens']:,} prompt tokens",
    )
    grid.add_row("Switches", "", f"{totals['switches']:,} in {sum(totals['steps'].values()):,} steps since the start")
    return grid


def _bar(shares: dict[str, float], unicode: bool) -> Text:
    """Return a bar with a part for each mode. The start of each part is rounded, so that the parts fill the bar."""
    bar, modes = Text(), list(shares)
    starts = [round(BAR * sum(shares[mode] for mode in modes[i:])) for i in range(1, len(modes))]
    for i, (start, end) in enumerate(zip([BAR, *starts], [*starts, 0], strict=True)):
        block = BLOCKS[i % len(BLOCKS)] if unicode else modes[i][0].upper()
        bar.append(block * (start - end), STYLES[i % len(STYLES)])
    return bar


def _step_times(data: dict[str, Any]) -> RenderableType:
    if not data["step_times"]:
        return Text("Step times: none has been timed yet")
    grid = _grid()
    grid.add_column("Step times")
    for name in ("count", *PERCENTILES, "actual/predicted"):
        grid.add_column(name, justify="right")
    for row in data["step_times"]:
        ratio = row["actual_over_predicted"]
        grid.add_row(
            mode_text(row["mode"], data["modes"], f" {row['phase']}"),
            f"{row['count']:,}",
            *(seconds(row[p]) for p in PERCENTILES),
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return grid


def _requests(data: dict[str, Any]) -> RenderableType:
    requests = data["requests"]
    if not requests["count"]:
        return Text("Requests: none has finished yet")
    grid = _grid()
    grid.add_column(f"Last {requests['count']:,} requests")
    for name in PERCENTILES:
        grid.add_column(name, justify="right")
    for key, name in (("ttft", "first token"), ("tpot", "each further token"), ("e2e", "whole request")):
        grid.add_row(name, *(seconds((requests[key] or {}).get(p)) for p in PERCENTILES))
    if gaps := (data.get("gaps") or {}).get("1"):
        grid.add_row("gap, last minute", *(seconds(gaps[p]) for p in PERCENTILES))
    return grid


def _switches(data: dict[str, Any], count: int) -> RenderableType:
    if not data["switches"]:
        return Text("Last switches: the mode has not changed yet")
    grid = _grid()
    grid.add_column("Last switches", no_wrap=True, min_width=13)
    grid.add_column("why", no_wrap=True, overflow="ellipsis")
    for switch in data["switches"][:count]:
        when = time.strftime("%H:%M:%S", time.localtime(switch["time"]))
        grid.add_row(Text.assemble(f"{when} ", mode_text(switch["mode"], data["modes"])), plain(switch["reason"]))
    return grid
