#!/usr/bin/env python3
"""Shift Parallelism and stock SGLang side by side on one machine.

    python benchmark/compare.py                        # demo model, 2 ranks
    python benchmark/compare.py --smoke                # a quick try
    python benchmark/compare.py --model-path DIR --tp-size 8 --dtype bfloat16 -- --mem-fraction-static 0.8

Every round visits every contender: start a server, warm it up, measure it with
``sglang.bench_serving``, stop it. The order rotates from round to round, and ratios are taken
within a round, so that a machine that is slower for a while does not favour anyone. Prompts are
the same for all contenders of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from serving import Failure, Load, serving

BASELINE = "stock-tp"
START_UP = "start-up, s"
SMOKE = {
    "rounds": 1,
    "contenders": [BASELINE, "shift"],
    "prompts": 8,
    "lengths": [128],
    "requests": 3,
    "extra_flags": ["--sleep-on-idle"],  # an idle server polls: with few cores that slows the start of the client
}
STARTED = time.monotonic()


@dataclass
class Visit:
    """What one round found of one contender.

    Attributes:
        contender: Whom.
        round: From 1.
        load_average: Of the machine, over the minute before.
        figures: What the table reports, by label.
        steps: Steps by mode, warm-up included; None from stock SGLang.
        results: All that ``bench_serving`` reported, by load.
    """

    contender: str
    round: int
    load_average: float
    figures: dict[str, float]
    steps: dict[str, int] | None
    results: dict[str, dict[str, Any]]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark/compare.py",
        description="Compare Shift Parallelism with stock SGLang on this machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    contenders = list(contender_flags(2))
    parser.add_argument("--contenders", nargs="+", choices=contenders, default=contenders, metavar="NAME",
                        help=f"of {', '.join(contenders)}; ratios are to {BASELINE}")
    parser.add_argument("--model-path", help="model to serve; the package's demo model if left out")
    parser.add_argument("--dtype", help="passed on to the servers")
    parser.add_argument("--tp-size", type=int, default=2, metavar="P", help="ranks")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="visits to each contender")
    parser.add_argument("--prompts", type=int, default=64, help="requests sent at once to saturate a server")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of each of these prompts")
    parser.add_argument("--output-len", type=int, default=32, help="tokens that any request generates")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024], metavar="N",
                        help="prompt lengths to send one request at a time with")
    parser.add_argument("--requests", type=int, default=8, help="requests per such length")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR",
                        help="folder for results.json, results.md and the servers' logs")
    parser.add_argument("--port", type=int, default=0, help="port of the servers; 0: any that is free")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS",
                        help="what a server may take to start, and a measurement to end")
    parser.add_argument("--smoke", action="store_true",
                        help="minimal settings (explicit flags still count), to see that everything works")
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="more flags, for every server")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    if min(args.rounds, args.prompts, args.requests, args.input_len, args.output_len - 1, *args.lengths) < 1:
        parser.error("counts and lengths must be positive, --output-len at least 2")
    return args


def contender_flags(ranks: int) -> dict[str, list[str]]:
    """The flags that make each contender."""
    size = ["--tp-size", str(ranks)]
    return {
        BASELINE: size,
        "tp": [*size, "--enable-shift-parallel", "--shift-policy", "tp"],
        "sp": [*size, "--sp-size", str(ranks)],
        "shift": [*size, "--enable-shift-parallel"],
    }


def server_flags(contender: str, args: argparse.Namespace) -> list[str]:
    flags = list(contender_flags(args.tp_size)[contender])
    for name in ("model_path", "dtype"):
        if (value := getattr(args, name)) is not None:
            flags += ["--" + name.replace("_", "-"), value]
    return flags + args.extra_flags


def loads(args: argparse.Namespace) -> list[Load]:
    """What every server is put under."""
    throughput = {"total tokens/s": "total_throughput", "output tokens/s": "output_throughput"}
    latency = {"TTFT, ms": "median_ttft_ms", "TPOT, ms": "median_tpot_ms"}
    saturated = Load("saturated", args.prompts, args.input_len, args.output_len, None, throughput)
    return [saturated] + [
        Load(f"one at a time, {length} tokens", args.requests, length, args.output_len, 1, latency)
        for length in args.lengths
    ]


def visit(contender: str, number: int, args: argparse.Namespace) -> Visit:
    """Start, warm up, measure and stop one server.

    Raises:
        Failure: with the reason.
    """

    def progress(what: str) -> None:
        elapsed = time.monotonic() - STARTED
        print(f"[{elapsed:5.0f} s] round {number}/{args.rounds}, {contender}: {what}", file=sys.stderr, flush=True)

    load_average = os.getloadavg()[0]
    progress("starting")
    started = time.monotonic()
    try:
        with serving(server_flags(contender, args), args.port, args.out / f"{contender}.log", args.timeout) as server:
            figures = {START_UP: time.monotonic() - started}
            results = {}
            for load in loads(args):
                progress(load.name)
                server.warm_up(load, args.timeout)
                result = results[load.name] = server.measure(load, number, args.timeout)
                figures |= {f"{load.name}: {label}": result[key] for label, key in load.figures.items()}
            return Visit(contender, number, load_average, figures, server.shift_steps(), results)
    except Failure as failure:
        raise Failure(f"{contender}, round {number}: {failure}") from None


def summarize(visits: list[Visit]) -> dict[str, dict[str, dict[str, float]]]:
    """By contender and figure: median, min and max over the rounds, and the median ratio within a round."""
    baseline = {v.round: v.figures for v in visits if v.contender == BASELINE}
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for contender in dict.fromkeys(v.contender for v in visits):
        mine = [v for v in visits if v.contender == contender]
        summary[contender] = {}
        for label in mine[0].figures:
            values = [v.figures[label] for v in mine]
            entry = {"median": median(values), "min": min(values), "max": max(values)}
            if contender != BASELINE and baseline:
                entry["ratio"] = median(v.figures[label] / baseline[v.round][label] for v in mine)
            summary[contender][label] = entry
    return summary


def markdown(visits: list[Visit], contenders: list[str], command: str, machine: dict[str, Any]) -> str:
    """The table, and what made it."""
    summary = summarize(visits)
    lines = ["| | " + " | ".join(f"`{c}`" for c in contenders) + " |", "| --- |" + " --: |" * len(contenders)]
    for label in visits[0].figures:
        cells = [_cell(summary[c][label]) for c in contenders]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    steps = [_steps([v for v in visits if v.contender == c]) for c in contenders]
    lines.append("| steps in TP / in SP | " + " | ".join(steps) + " |")
    rounds = max(v.round for v in visits)
    ratios = f" **r x**: ratio to `{BASELINE}` in the same round, median." if BASELINE in contenders else ""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    lines += [
        "",
        f"Median over {rounds} round{'s' * (rounds > 1)} (min to max).{ratios} Tokens/s: higher is better; "
        "times: lower. Steps: all rounds, warm-up included.",
        "",
        f"Made by `{command}` on: {facts}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, float]) -> str:
    digits = 0 if entry["median"] >= 1000 else 1 if entry["median"] >= 10 else 2
    middle, low, high = (f"{entry[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})" + (f" **{entry['ratio']:.2f} x**" if "ratio" in entry else "")


def _steps(visits: list[Visit]) -> str:
    counts = [v.steps for v in visits if v.steps is not None]
    return " / ".join(str(sum(c[mode] for c in counts)) for mode in ("tp", "sp")) if counts else "stock"


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = ""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name", "--format=csv,noheader"]
        gpus = " + ".join(subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines())
    return {
        "CPU": (models or [platform.processor()])[0],
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "GPUs": gpus,
        "Python": platform.python_version(),
        **{package: version(package) for package in ("torch", "sglang", "sglang_shift")},
    }


def write(visits: list[Visit], args: argparse.Namespace, command: str) -> str:
    """Write results.json and results.md; returns the latter."""
    machine = describe_machine()
    report = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "contenders": {name: shlex.join(server_flags(name, args)) for name in args.contenders},
        "summary": summarize(visits),
        "visits": [asdict(v) for v in visits],
    }
    text = markdown(visits, args.contenders, command, machine)
    (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "results.md").write_text(text)
    return text


def main(argv: list[str]) -> None:
    args = parse(argv)
    args.contenders = list(dict.fromkeys(args.contenders))
    args.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmark/compare.py", *argv])
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    visits: list[Visit] = []
    text = ""
    try:
        for number in range(args.rounds):
            first = number % len(args.contenders)
            for contender in args.contenders[first:] + args.contenders[:first]:
                visits.append(visit(contender, number + 1, args))
            text = write(visits, args, command)
    except Failure as failure:
        sys.exit(f"compare: error: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
