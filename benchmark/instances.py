#!/usr/bin/env python3
"""Compare policies for instances that merge and split, in the simulator, on the cost model of 8 x H200.

    python benchmark/instances.py                      # the grid: rates x shares of long prompts
    python benchmark/instances.py --day                # a day in short instead: idle, a ramp to the load, a burst
    python benchmark/instances.py --trace FILE         # windows of a trace instead
    python benchmark/instances.py --trace FILE --fit 0.5   # its longest request needs half of all KV tokens

Every contender gets the same requests.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
from sglang_shift.cost.deployment import InstancePolicy
from sglang_shift.cost.layouts import CostsByLevel, InstanceCosts, Layout, Load, RequestClass, layouts
from sglang_shift.modes import Mode
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.policy.instances import AutoPolicy, PaperPolicy
from sglang_shift.simulate.instances import Outcome, Transformation, simulate
from sglang_shift.simulate.simulator import ServedRequest
from sglang_shift.simulate.traces import read_trace
from sglang_shift.simulate.traffic import Request, cut_window, scale, steady
from sglang_shift.tools.benchmark.workloads import Plan, Sizes
from sglang_shift.tools.plan.hardware import gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.paper import MODELS
from sglang_shift.tools.plan.step_time import StepTimes

CHUNK = 8192
PROMPT, OUTPUT = (256, 8192), (32, 512)
NAN = float("nan")
ORACLE = "best static"
BURST_S = 4
"""Requests of a day's burst, in seconds of Shift's capacity."""


def levels_of(model_name: str, ranks: int, pool: int | None) -> CostsByLevel:
    """Return the levels of a node of H200 whose ranks each hold all weights."""
    model, gpu = MODELS[model_name], gpus()["H200"]
    tokens = pool or memory(model, gpu, RankLayout(1, 1), CHUNK).tokens
    sizes = [2**i for i in range(ranks.bit_length())]
    return {
        k: InstanceCosts(k, StepTimes(model, gpu, RankLayout(k, k)).cost_model(), k * tokens, chunk=CHUNK)
        for k in sizes
    }


def only(levels: CostsByLevel, mode: Mode) -> CostsByLevel:
    """Return the levels with steps in one mode."""
    return {k: replace(level, modes=(mode,)) for k, level in levels.items()}


@dataclass(frozen=True)
class Contender:
    """A way to use the ranks."""

    name: str
    policy: InstancePolicy
    levels: CostsByLevel
    layout: Layout


def contenders(levels: CostsByLevel, ranks: int, change: Transformation) -> list[Contender]:
    """Return the contenders. A policy keeps state, so each run needs new ones."""
    one, tp = (1,) * ranks, only(levels, Mode.TP)
    two = (ranks // 2,) * 2
    return [
        Contender("DP", InstancePolicy(), levels, one),
        Contender("TP", InstancePolicy(), tp, (ranks,)),
        Contender("2 x Shift", InstancePolicy(), levels, two),
        Contender("Shift", InstancePolicy(), levels, (ranks,)),
        Contender("paper's rules", PaperPolicy(tp), tp, one),
        Contender("auto", AutoPolicy(ranks, levels, change.seconds), levels, one),
    ]


def traffic(
    rate: float, long_share: float, seconds: float, levels: CostsByLevel, ranks: int, seed: int
) -> list[Request]:
    """Return Poisson arrivals. Long prompts fit a merged instance alone."""
    rng = random.Random(seed)
    requests = steady(rate, prompt=PROMPT, output=OUTPUT, requests=max(2, round(rate * seconds)), seed=seed)
    low, high = long_prompts(levels, ranks)
    return [replace(r, prompt=rng.randint(low, high)) if rng.random() < long_share else r for r in requests]


def long_prompts(levels: CostsByLevel, ranks: int) -> tuple[int, int]:
    """Return the lengths of long prompts. They fit a merged instance alone."""
    return int(1.2 * levels[1].tokens), int(0.5 * levels[ranks].tokens)


def day(unit: float, load: float, seconds: float, levels: CostsByLevel, ranks: int) -> list[Request]:
    """Return the benchmark's day in short. Its ramp ends at ``load``, and its idle part has a tenth of that."""
    sizes = Sizes(
        prompt=PROMPT, output=OUTPUT, long_prompt=long_prompts(levels, ranks), day_seconds=seconds, day_peak=load,
        day_idle=load / 10, burst=round(BURST_S * unit),
    )  # fmt: skip
    plan = Plan(["day"], sizes, levels[ranks].tokens)
    sample = plan.saturated()
    [made] = plan.workloads(unit * sample.tokens / len(sample.requests))
    return list(made.requests)


def capacity(levels: CostsByLevel, ranks: int) -> float:
    """Return the requests per second that a Shift instance of all ranks serves, without long prompts."""
    sample = steady(1.0, prompt=PROMPT, output=OUTPUT, requests=2000)
    mean = RequestClass(1.0, fmean(r.prompt for r in sample), fmean(r.output for r in sample), 0)
    return Load(levels[ranks], [mean]).capacity


def figures(outcome: Outcome, begin: float, end: float, limit: int) -> dict[str, float]:
    """Return the throughput of the whole run, and latencies of the requests that arrived in a window.

    All contenders begin without requests. So after the whole run, they differ by what is left undone.
    """
    mine = [s for s in outcome.served if begin <= s.request.time < end]
    groups = {
        "short": [s for s in mine if s.request.prompt + s.request.output <= limit],
        "long": [s for s in mine if s.request.prompt + s.request.output > limit],
    }
    return {
        "tokens/s": outcome.computed_per_second(0, int(end)),
        "ended tokens/s": outcome.tokens_per_second(begin, end),
        "rejected": len(outcome.rejected),
        "unserved": outcome.unserved,
        "e2e mean": fmean([s.e2e for s in mine] or [NAN]),
        **{name: value for group, served in groups.items() for name, value in latencies(group, served).items()},
        **levels_of_time(outcome),
        "changes": len(outcome.changes),
    }


def latencies(group: str, served: Sequence[ServedRequest]) -> dict[str, float]:
    """Return percentiles of the latencies of a group of requests, in seconds."""
    values = {"ttft": [s.ttft for s in served], "tpot": [s.tpot for s in served if s.tpot is not None]}
    return {
        f"{group} {name} p{percent}": float(np.percentile(seconds or [NAN], percent))
        for name, seconds in values.items()
        for percent in (50, 99)
    }


def levels_of_time(outcome: Outcome) -> dict[str, float]:
    """Return the share of the ranks' time at each level."""
    seconds: dict[int, float] = {}
    for layout, time in outcome.seconds_at.items():
        for level in layout:
            seconds[level] = seconds.get(level, 0.0) + level * time
    return {f"at level {level}": seconds[level] / sum(seconds.values()) for level in sorted(seconds)}


def requests_of(args: argparse.Namespace, load: float, share: float, seed: int, levels: CostsByLevel) -> list[Request]:
    """Return the requests of a run: of a day, of a window of the trace at ``load`` times its rate, or made-up ones."""
    unit = capacity(levels, args.ranks)
    if args.day:
        return day(unit, load, args.seconds, levels, args.ranks)
    if args.trace:
        start, seconds = seed * args.seconds * load, args.seconds * load
        if not (window := cut_window(read_trace(args.trace), start, seconds)):
            sys.exit(
                f"{args.trace} has no requests from {start:g} to {start + seconds:g} s; give smaller --loads or --seeds"
            )
        if not args.fit:
            return scale(window, time=1 / load, context=levels[args.ranks].tokens // 2)
        longest = max(r.prompt + r.output for r in window)
        return scale(window, time=1 / load, length=args.fit * levels[args.ranks].tokens / longest)
    return traffic(load * unit, share, args.seconds, levels, args.ranks, seed)


def best_static(requests: Sequence[Request], levels: CostsByLevel, ranks: int, begin: float, end: float) -> dict:
    """Return the figures of the best layout that never changes, which only the future tells.

    It rejects nothing. Of layouts whose throughput is within 1 %, it has the lowest mean time of a request.
    """
    runs = []
    for layout in layouts(ranks, sorted(levels)):
        result = simulate(requests, InstancePolicy(), levels, layout, until=end)
        if not result.rejected:
            runs.append({"layout": "+".join(map(str, layout)), **figures(result, begin, end, levels[1].tokens)})
    most = max(run["tokens/s"] for run in runs)
    return min((run for run in runs if run["tokens/s"] >= 0.99 * most), key=lambda run: run["e2e mean"])


def main(argv: Sequence[str]) -> int:
    """Print a table, and write all figures as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="Llama-70B")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--pool", type=int, help="KV tokens of a rank; what an H200 has left if not given")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.1, 0.5, 0.9, 1.2, 1.6],
                        help="shares of the capacity of Shift, or factors on the rate of the trace")  # fmt: skip
    parser.add_argument("--long", type=float, nargs="+", default=[0.0, 0.002, 0.005, 0.02])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each cell; of a trace, windows")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--change", type=float, default=0.5, help="seconds of a transformation")
    parser.add_argument("--trace", type=Path, help="a trace: arrivals and lengths of windows of --seconds")
    parser.add_argument(
        "--fit", type=float, help="scale its lengths: the longest request needs this share of all tokens"
    )
    parser.add_argument("--day", action="store_true", help="a day in short, which has no seed and no share of its own")
    parser.add_argument("--contenders", nargs="+", help="only these")
    parser.add_argument("--out", help="a CSV file for all figures")
    args = parser.parse_args(argv)
    levels = levels_of(args.model, args.ranks, args.pool)
    change = Transformation(args.change)
    unit = capacity(levels, args.ranks)
    print(f"KV tokens of a rank: {levels[1].tokens}; Shift's capacity without long prompts: {unit:.3g} requests/s")
    rows: list[dict] = []
    for load in args.loads:
        for share in [0.0] if args.trace or args.day else args.long:
            for seed in range(1 if args.day else args.seeds):
                requests = requests_of(args, load, share, seed, levels)
                begin, end = requests[-1].time / 6, requests[-1].time
                row = {"load": load, "long": share, "seed": seed}
                for c in contenders(levels, args.ranks, change):
                    if args.contenders is None or c.name in args.contenders:
                        result = simulate(requests, c.policy, c.levels, c.layout, change, until=end)
                        found = figures(result, begin, end, levels[1].tokens)
                        rows.append({**row, "contender": c.name, "layout": "", **found})
                if args.contenders is None or ORACLE in args.contenders:
                    rows.append({**row, "contender": ORACLE, **best_static(requests, levels, args.ranks, begin, end)})
            print_table(rows, load, share)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(n for r in rows for n in r)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


def print_table(rows: list[dict], load: float, share: float) -> None:
    """Print the means over the seeds."""
    mine = [r for r in rows if (r["load"], r["long"]) == (load, share)]
    print(f"\n## load {load:g}, {share:.1%} long")
    row = ("load", "long", "seed", "contender", "layout")
    names = [n for n in dict.fromkeys(n for r in mine for n in r) if n not in row]
    for contender in dict.fromkeys(r["contender"] for r in mine):
        its = [r for r in mine if r["contender"] == contender]
        text = ", ".join(f"{n} {fmean(r.get(n, 0.0) for r in its):.4g}" for n in names)
        print(f"{contender:14s} {text} {' '.join(r['layout'] for r in its)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
