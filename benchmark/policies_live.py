#!/usr/bin/env python3
"""Compare policies on one real server, whose policy changes at run time.

    python benchmark/make_model.py /tmp/model
    python benchmark/policies_live.py --model-path /tmp/model [--trace AzureLLMInferenceTrace_code.csv]

One server starts and calibrates itself. Every round replays the same requests under every policy, in an order that
rotates from round to round. Ratios are taken within a round, so a machine that is slower for a while favours no policy.
Prompts are random tokens, and different each time, so nothing is cached. Rates follow from the server's rate at
saturation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import aiohttp
from sglang_shift.simulate.traces import read_trace
from sglang_shift.simulate.traffic import Request, bursty, cut_window, ramp, scale, steady
from sglang_shift.tools.benchmark.environment import describe_machine
from sglang_shift.tools.servers import Failure, call, serving

POLICIES: dict[str, dict[str, Any]] = {
    "tp": {"shift_policy": "tp"},
    "sp": {"shift_policy": "sp"},
    **{f"tokens {n}": {"shift_policy": "tokens", "shift_threshold": n} for n in (32, 128, 512)},
    "calibrated": {"shift_policy": "calibrated"},
}
FIXED = ("tp", "sp")
PROMPT, OUTPUT = (32, 1024), (4, 32)
LOW, HIGH = 0.25, 0.85  # of the capacity
STREAM, BURST_SHARE = 0.2, 0.4


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile. It interpolates between the two closest values, so it is no more than the largest."""
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else values[0]


class Client:
    """Sends requests at their times, and records the times of their tokens.

    Args:
        url: URL of the server.
        vocabulary: Prompts consist of token ids below this number.
    """

    def __init__(self, url: str, vocabulary: int = 4000) -> None:
        self.url, self.vocabulary = url, vocabulary
        self.random = random.Random(0)

    def replay(self, requests: Sequence[Request], policy: dict[str, Any]) -> dict[str, float]:
        """Send all ``requests`` under a policy. Return seconds, and tokens per second."""
        return asyncio.run(self._replay(requests, policy))

    async def _replay(self, requests: Sequence[Request], policy: dict[str, Any]) -> dict[str, float]:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            async with session.post(self.url + "/set_internal_state", json={"server_args": policy}) as answer:
                if await answer.json() != [True]:
                    raise Failure(f"the server does not take {policy}")
            started = time.perf_counter()
            rows = await asyncio.gather(*(self._ask(session, r, started) for r in requests))
        span = max(end for _, _, end in rows)
        tokens = sum(r.prompt + r.output for r in requests)
        ends = [end - r.time for r, (_, _, end) in zip(requests, rows, strict=True)]
        return {
            "TTFT": fmean(ttft for ttft, _, _ in rows),
            "TPOT": fmean(tpot for _, tpot, _ in rows),
            "E2E": fmean(ends),
            "p99 E2E": p99(ends),
            "tokens/s": tokens / span,
        }

    async def _ask(self, session: aiohttp.ClientSession, r: Request, started: float) -> tuple[float, float, float]:
        ids = [self.random.randrange(256, self.vocabulary) for _ in range(r.prompt)]
        await asyncio.sleep(max(0.0, started + r.time - time.perf_counter()))
        sampling = {"temperature": 0, "max_new_tokens": r.output, "ignore_eos": True}
        sent, first = time.perf_counter(), 0.0
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        async with session.post(self.url + "/generate", json=body) as answer:
            if answer.status != 200:
                raise Failure(f"/generate: {answer.status} {(await answer.text())[:200]}")
            async for line in answer.content:
                if line.startswith(b"data: {") and not first:
                    first = time.perf_counter()
        end = time.perf_counter()
        if not first:
            raise Failure("/generate: an empty stream")
        return first - sent, (end - first) / max(1, r.output - 1), end - started


def traffics(client: Client, args: argparse.Namespace) -> dict[str, list[Request]]:
    """Return the loads by name, at rates that suit this server."""
    batch = steady(1.0, prompt=PROMPT, output=OUTPUT, requests=48)
    client.replay(scale(batch, time=0.0), POLICIES["calibrated"])  # warm-up
    capacity = max(_rate(client, batch, policy) for policy in FIXED)
    print(f"capacity: {capacity:.2f} requests/s of the better fixed mode", file=sys.stderr, flush=True)
    lengths: dict[str, Any] = {"prompt": PROMPT, "output": OUTPUT}

    def count(share: float) -> int:
        return max(8, round(share * capacity * args.seconds))

    every = args.seconds / 3
    burst = round(BURST_SHARE * capacity * every)
    made = {
        "steady low": steady(LOW * capacity, requests=count(LOW), seed=1, **lengths),
        "steady high": steady(HIGH * capacity, requests=count(HIGH), seed=2, **lengths),
        "ramp": ramp(0.05 * capacity, capacity, requests=count(0.5), seed=3, **lengths),
        "bursty": bursty(STREAM * capacity, seconds=args.seconds, burst=burst, every=every, seed=4, **lengths),
    }
    if args.trace:
        start, seconds = args.window
        part = scale(cut_window(read_trace(args.trace), start, seconds), length=args.length, context=4096)
        share = _rate(client, part[:48], "sp")
        made["Azure code"] = scale(part, time=len(part) / (0.6 * share) / seconds)
    return {name: r for name, r in made.items() if name in (args.traffic or made)}


def _rate(client: Client, requests: Sequence[Request], policy: str) -> float:
    started = time.perf_counter()
    client.replay(scale(requests, time=0.0), POLICIES[policy])
    return len(requests) / (time.perf_counter() - started)


def table(name: str, rounds: list[dict[str, dict[str, float]]]) -> str:
    """Return a traffic's table: medians over the rounds, and the median ratio of ``calibrated`` to each policy."""
    metrics = list(next(iter(rounds[0].values())))
    lines = [f"### {name}", "", "| policy | " + " | ".join(metrics) + " | calibrated / it |",
             "| --- |" + " --: |" * (len(metrics) + 1)]  # fmt: skip
    r0 = rounds[0]
    for policy in r0:
        values = [f"{median(r[policy][m] for r in rounds) * (1 if m == 'tokens/s' else 1e3):.1f}" for m in metrics]
        ratios = [
            f"{m} {median(r['calibrated'][m] / r[policy][m] for r in rounds):.2f}"
            for m in metrics
            if "calibrated" in r0
        ]
        lines.append(
            f"| {policy} | " + " | ".join(values) + f" | {'' if policy == 'calibrated' else ', '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def compare(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run all traffics, rounds and policies."""
    client = Client(url)
    loads = traffics(client, args)
    results: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in loads}
    names = args.policies
    for number in range(args.rounds):
        for name, requests in loads.items():
            order = names[number * 3 % len(names) :] + names[: number * 3 % len(names)]
            found = {policy: client.replay(requests, POLICIES[policy]) for policy in order}
            results[name].append({policy: found[policy] for policy in names})
            print(f"round {number + 1}:\n{table(name, results[name])}", file=sys.stderr, flush=True)
    state = call(url + "/server_info")["internal_states"][0]["shift"]
    return {"machine": describe_machine(), "calibration": state["calibration"], "policy": state["policy"],
            "costs": state["costs"], "requests": {n: len(r) for n, r in loads.items()}, "results": results}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model-path", help="model to serve; the package's demo model if left out")
    parser.add_argument("--tp-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals in one replay")
    parser.add_argument("--traffic", nargs="+", help="only these of the traffics")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="NAME")
    parser.add_argument("--trace", type=Path, help="Azure CSV or Mooncake JSONL: a further traffic")
    parser.add_argument(
        "--window", type=float, nargs=2, default=(0, 60), metavar=("START", "SECONDS"), help="of the trace"
    )
    parser.add_argument("--length", type=float, default=0.25, help="factor on the trace's lengths")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="more flags for the server")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    flags = ["--tp-size", str(args.tp_size), "--enable-shift-parallel", *args.extra_flags]
    flags += ["--model-path", args.model_path] if args.model_path else []
    try:
        with serving(flags, 0, args.out / "policies_live.log", args.timeout) as server:
            report = compare(server.url, args)
    except Failure as failure:
        sys.exit(f"policies_live: error: {failure}")
    (args.out / "policies_live.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['policy']}\n\nTimes in milliseconds; {args.rounds} rounds.\n")
    for name, rounds in report["results"].items():
        print(table(f"{name}, {report['requests'][name]} requests", rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
