#!/usr/bin/env python3
"""Load a server for a long time, in changing ways, and look for leaks, wrong answers and lost requests.

    python benchmark/soak.py                 # 30 minutes, demo model, 2 ranks
    python benchmark/soak.py --minutes 3

Cycles follow each other. Each cycle has these phases: idle, one client, many clients, bursts, long prompts. The policy
changes at run time with every cycle. SGLang's rank-consensus checker is on, and it ends the server if ranks differ.
Every answer is compared with the first answer to the same prompt (float32, greedy). The exit code is 1 if a request got
no answer or another answer. It is also 1 if memory grew by more than ``--growth`` after the warm-up.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import requests
from sglang_shift.tools import servers
from sglang_shift.tools.servers import Failure, Server

FLAGS = ["--tp-size", "2", "--enable-shift-parallel", "--dtype", "float32", "--sleep-on-idle", "--enable-metrics"]
POLICIES: tuple[dict[str, Any], ...] = (
    {"shift_policy": "calibrated"},
    {"shift_policy": "tokens", "shift_threshold": 64},
    {"shift_policy": "queue-depth", "shift_enter_requests": 12, "shift_leave_requests": 6},
)
PHASES = ("idle", "one client", "16 clients", "bursts", "long prompts")


@dataclass
class Soak:
    """The results so far.

    Attributes:
        url: URL of the server.
        counts: Number of requests by outcome: ``answered``, ``different``, or an error.
    """

    url: str
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, prompt: int, tokens: int) -> None:
        """Send one request, and compare its answer with the first answer."""
        body = {
            "text": PROMPTS[prompt],
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        try:
            answer = requests.post(self.url + "/generate", json=body, timeout=300)
            ids = answer.json()["output_ids"] if answer.ok else None
            outcome = "answered" if answer.ok else f"HTTP {answer.status_code}"
        except requests.RequestException as error:
            ids, outcome = None, type(error).__name__
        with self.lock:
            if ids is not None and self.first.setdefault((prompt, tokens), ids) != ids:
                outcome = "different"
            self.counts[outcome] += 1


def prompts() -> list[str]:
    """Return beginnings of standard-library sources, of 100 to 8,000 characters."""
    chooser = random.Random(0)
    sources = [inspect.getsource(module) for module in (argparse, inspect, random, threading, json)]
    return [chooser.choice(sources)[: int(100 * 80 ** chooser.random())] for _ in range(48)]


PROMPTS = prompts()


def run_phase(soak: Soak, phase: str, seconds: float, seed: int) -> None:
    """Put one kind of load on the server for a while. This returns when all answers have arrived."""
    ends = time.monotonic() + seconds
    chooser = random.Random(seed)
    short = [i for i, p in enumerate(PROMPTS) if len(p) < 2000]

    def client(me: int) -> None:
        mine = random.Random(seed * 1000 + me)
        while time.monotonic() < ends:
            soak.ask(mine.choice(short), mine.choice((4, 16, 48)))

    if phase == "idle":
        time.sleep(seconds)
    elif phase == "bursts":
        with ThreadPoolExecutor(32) as pool:
            while time.monotonic() < ends:
                list(pool.map(lambda i: soak.ask(i, 8), chooser.choices(short, k=32)))
                time.sleep(1)
    elif phase == "long prompts":
        while time.monotonic() < ends:
            soak.ask(max(range(len(PROMPTS)), key=lambda i: (len(PROMPTS[i]), i)), 4)
            requests.post(soak.url + "/flush_cache", timeout=60)
    else:
        clients = 1 if phase == "one client" else 16
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))


def growth(samples: list[dict[str, int]]) -> dict[str, float]:
    """Return the growth of each process from the median of the first third to that of the last third, as a share."""
    third = max(1, len(samples) // 3)
    names = samples[-1]
    return {
        n: median(s.get(n, 0) for s in samples[-third:]) / median(s.get(n, 1) for s in samples[:third]) - 1
        for n in names
    }


def soak_server(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Run all cycles, and return the report with the verdict."""
    soak, started, samples, cycle = Soak(server.url), time.monotonic(), [], 0
    while time.monotonic() - started < 60 * args.minutes:
        policy = POLICIES[cycle % len(POLICIES)]
        answer = requests.post(server.url + "/set_internal_state", json={"server_args": policy}, timeout=60)
        if not answer.ok or answer.json() != [True]:
            raise Failure(f"/set_internal_state {policy}: {answer.status_code} {answer.text[:200]}", server.log)
        for number, phase in enumerate(PHASES):
            run_phase(soak, phase, args.phase_seconds, 100 * cycle + number)
            server.check_alive(f"in phase {phase}")
        elapsed = time.monotonic() - started
        sample = server.memory()
        if elapsed > 60 * args.warm_up:
            samples.append(sample)
        total = sum(sample.values()) / 2**20
        print(
            f"[{elapsed:5.0f} s] {policy['shift_policy']}: {total:.1f} MiB, {dict(soak.counts)}",
            file=sys.stderr,
            flush=True,
        )
        cycle += 1
    state = requests.get(server.url + "/server_info", timeout=60).json()["internal_states"][0]["shift"]
    grown = growth(samples) if samples else {}
    totals = growth([{"all": sum(s.values())} for s in samples]) if samples else {"all": 0.0}
    bad = {what: n for what, n in soak.counts.items() if what != "answered"}
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "requests": dict(soak.counts),
        "steps": state["steps"],
        "switches": state["switches"],
        "growth_of_memory": totals["all"],
        "growth_by_process": grown,
        "memory_samples": samples,
        "passed": not bad and bool(samples) and totals["all"] <= args.growth,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--phase-seconds", type=float, default=8, help="length of one kind of load")
    parser.add_argument("--warm-up", type=float, default=5, help="minutes whose memory does not count")
    parser.add_argument("--growth", type=float, default=0.02, help="what memory may grow by after that, as a share")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", help="folder for soak.json and the log"
    )
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="more flags for the server")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    flags, checked = [*FLAGS, *args.extra_flags], {"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
    try:
        with servers.serving(flags, 0, args.out / "soak.log", args.timeout, checked) as server:
            report = soak_server(server, args)
    except Failure as failure:
        sys.exit(f"soak: error: {failure}")
    (args.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "memory_samples"}, indent=1))
    sys.exit(0 if report["passed"] else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
