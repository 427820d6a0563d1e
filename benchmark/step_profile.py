#!/usr/bin/env python3
"""Show how a step spends its time: SGLang's profiler on rank 0, self time by operator.

    python benchmark/step_profile.py stock-tp shift:sp --model-path DIR                    # a prefill
    python benchmark/step_profile.py stock-tp tp --model-path DIR --decode --link-rate 387e6

Each contender has a name as in ``python -m sglang_shift.benchmark``. It is started, warmed up, timed without the
profiler, and then profiled. A prefill is a prompt of ``--tokens``. With ``--decode``, a step is one token of a request
that decodes alone. The profile then has 96 decodes of three requests, and also the three prefills of their 16 tokens.
All of it is divided by 96. On a GPU, the figures are the figures of the host.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.tools import servers
from sglang_shift.tools.benchmark.contenders import Contender, parse_contenders
from sglang_shift.tools.benchmark.link import Link, start_on

PREFILLS, DECODES = 3, 96
"""Number of steps that are profiled."""

EDGE = 1e-3  # microseconds by which an event may end after the event around it


def generate(server: servers.Server, prompt: int, new: int) -> float:
    """Return the seconds of a request with a random prompt of ``prompt`` tokens and an answer of ``new`` tokens."""
    ids = [random.randrange(5, 4000) for _ in range(prompt)]
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    servers.call(server.url + "/generate", body={"input_ids": ids, "sampling_params": sampling}, timeout=600)
    return time.perf_counter() - start


def read_trace(folder: Path, timeout: float = 120) -> list[dict[str, Any]]:
    """Return the events of rank 0, once the profiler has written all of them.

    Raises:
        ShiftError: the profiler did not write them in time.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for file in sorted(folder.rglob("*TP-0*.gz")) or sorted(folder.rglob("*.gz"))[:1]:
            try:
                events: list[dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
                mine = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation")]
                # A message on its way is no work of the thread: the operator around the message waits for it.
                return [e for e in mine if not e["name"].startswith("gloo:")]
            except (EOFError, OSError, ValueError):
                pass  # the profiler is still writing it
        time.sleep(1)
    raise ShiftError(f"the profiler wrote no trace within {timeout:.0f} s")


def self_times(events: list[dict[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Return the self time of each operator in microseconds, and its calls, on the thread with most matrix products."""
    products: Counter[int] = Counter()
    for event in events:
        if event["name"].startswith(("aten::mm", "aten::addmm", "aten::linear", "mkldnn")):
            products[event["tid"]] += event["dur"]
    thread = products.most_common(1)[0][0]
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    around: list[dict[str, Any]] = []
    for event in sorted((e for e in events if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"] + EDGE:
            around.pop()
        own[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        if around:
            own[around[-1]["name"]] -= event["dur"]
        around.append(event)
    return own, calls


def gaps(events: list[dict[str, Any]], least: float) -> list[str]:
    """Return the gaps of ``least`` ms or more without an operator in one of our prefills.

    In a gap, Python runs or waits for messages.
    """
    steps = [e for e in events if e["name"].startswith("sglang_shift ")]
    if not steps:
        return []
    step = max(steps, key=lambda e: e["dur"])
    end = step["ts"] + step["dur"]
    inside = [e for e in events if e["tid"] == step["tid"] and step["ts"] <= e["ts"] < end and e is not step]
    found, idle_from, last = [], step["ts"], "its start"
    for event in sorted(inside, key=lambda e: (e["ts"], -e["dur"])):
        if (milliseconds := (event["ts"] - idle_from) / 1e3) >= least:
            found.append(f"{milliseconds:8.1f} ms between {last} and {event['name']}")
        if event["ts"] + event["dur"] > idle_from:
            idle_from, last = event["ts"] + event["dur"], event["name"]
    return found


def profile(contender: Contender, args: argparse.Namespace, folder: Path) -> None:
    """Print one contender's times.

    Raises:
        ShiftError: the contender does not start, or gives no trace.
    """
    flags = [*contender.flags, "--model-path", args.model_path, "--sleep-on-idle", *args.flags]
    shape = (16, 1 + DECODES // PREFILLS) if args.decode else (args.tokens, 1)
    steps = DECODES if args.decode else PREFILLS
    with Link(args.tp_size, args.link_rate) if args.link_rate and contender.ranks > 1 else nullcontext() as link:
        log = folder / f"{contender.name}.log"
        server = start_on(link, flags, 0, log) if link else servers.start(flags, 0, log)
        try:
            server.wait_until_healthy(args.timeout)
            times = [generate(server, *shape) for _ in range(7)][2:]
            what = {"output_dir": str(folder / contender.name), "activities": ["CPU"]}
            servers.call(server.url + "/start_profile", body=what, text=True)
            for _ in range(PREFILLS):
                generate(server, *shape)
            servers.call(server.url + "/stop_profile", body={}, text=True, timeout=300)
            events = read_trace(folder / contender.name)
        finally:
            server.stop()
    own, calls = self_times(events)
    kind = f"decoding {shape[1] - 1} tokens" if args.decode else f"a prompt of {args.tokens}"
    print(f"{contender.name}: {kind} takes {1e3 * median(times):.0f} ms (median of 5, not profiled); profiled, a step:")
    print(f"    {'ms':>8} {'calls':>7}  operator, without those inside it")
    for name, microseconds in own.most_common(args.rows):
        print(f"    {microseconds / steps / 1e3:8.2f} {calls[name] / steps:7.1f}  {name}")
    for gap in gaps(events, args.gaps) if args.gaps else ():
        print(f"    {gap}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt that is prefilled")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--link-rate", type=float, help="bit/s of an emulated link; none if left out")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--gaps", type=float, help="also show where the longest step ran no operator for so many ms")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a server may take to start")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of every server; the last argument")
    args = parser.parse_args()
    try:
        with TemporaryDirectory(prefix="sglang_shift_profile_") as folder:
            for whom in parse_contenders(args.contenders, args.tp_size):
                profile(whom, args, Path(folder))
    except ShiftError as error:
        print(f"step_profile: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
