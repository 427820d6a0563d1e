#!/usr/bin/env python3
"""Load instances with random requests, let them merge and split all the time, and look for leaks and wrong answers.

    python benchmark/soak_instances.py                          # 10 minutes for each of 3 seeds, demo model, 2 ranks
    python benchmark/soak_instances.py --minutes 1 --seeds 0    # a short form
    python benchmark/soak_instances.py --policy paper           # the server's policy merges and splits as well
    python benchmark/soak_instances.py --ranks 4 --kv-tokens 4096 -- --model-path DIR  # a model with 4 KV heads

Clients send prompts of random lengths. Some are too long for a small instance, so the server refuses them or merges
instances for them. Some clients hang up before their answer is complete. Meanwhile an operator asks for random merges
and splits. Every answer is compared with the first answer to the same prompt (float32, greedy). At the end of a seed,
no instance may count a request that nobody waits for, and all ranks must merge and split once more.

Memory is flat if no process grows by more than ``--growth`` of its size between the first and the last sample, on the
line fitted to the samples by least squares. Samples of the first ``--warm-up`` share of the time do not count. The exit
code is 1 if memory is not flat, or if a request got another answer or an error.
"""

from __future__ import annotations

import argparse
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
from typing import Any

import numpy as np
import requests
from sglang_shift.tools import servers
from sglang_shift.tools.servers import Failure

FLAGS = ["--enable-shift-parallel", "--shift-threshold", "20", "--dtype", "float32", "--sleep-on-idle"]
PROMPTS, LONG_PROMPTS = 48, 4
TOKENS = range(300, 1000)
"""Token ids of prompts."""
OUTPUTS = (1, 4, 16, 48)
ABORTED = 0.05
"""The share of requests whose client hangs up early."""
GOOD = ("answered", "refused", "hung up")
SAMPLE_S = 2.0


@dataclass
class Soak:
    """The results of a seed so far.

    Attributes:
        url: URL of the server.
        seed: The seed of everything that is random.
        ranks: P.
        prompts: The prompts, as token ids.
        counts: Number of requests by outcome.
        changes: Number of merges and splits by outcome.
        first: The first answer to each prompt and number of tokens.
        ends: When the clients and the operator stop, by the monotonic clock.
    """

    url: str
    seed: int
    ranks: int
    prompts: list[list[int]]
    ends: float
    counts: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self, number: int) -> None:
        """Send one request after the other, with random pauses."""
        chooser = random.Random(1000 * self.seed + number)
        while time.monotonic() < self.ends:
            self.ask(chooser.randrange(len(self.prompts)), chooser.choice(OUTPUTS), chooser.random() < ABORTED)
            if chooser.random() < 0.1:
                time.sleep(chooser.random())

    def ask(self, prompt: int, tokens: int, hang_up: bool) -> None:
        """Send a request, and compare its answer with the first answer."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": self.prompts[prompt], "sampling_params": sampling}
        ids, outcome = None, "answered"
        try:
            answer = requests.post(self.url + "/generate", json=body, timeout=0.05 if hang_up else 300)
            if answer.ok:
                ids = answer.json()["output_ids"]
            else:
                outcome = "refused" if answer.status_code == 400 else f"HTTP {answer.status_code}"
        except requests.Timeout:
            outcome = "hung up" if hang_up else "no answer in 300 s"
        except requests.RequestException as error:
            outcome = type(error).__name__
        with self.lock:
            if ids is not None and self.first.setdefault((prompt, tokens), ids) != ids:
                outcome = "different"
            self.counts[outcome] += 1

    def operator(self) -> None:
        """Ask for a random change, again and again."""
        chooser = random.Random(self.seed)
        while time.monotonic() < self.ends:
            level = 2 ** chooser.randrange(self.ranks.bit_length())
            ranks = level * 2 ** chooser.randrange((self.ranks // level).bit_length())
            first = ranks * chooser.randrange(self.ranks // ranks)
            self.change(level, first, ranks)
            time.sleep(chooser.random())

    def change(self, level: int, first: int, ranks: int) -> dict[str, Any]:
        """Ask for a change, count what came of it, and return the report."""
        body = {"level": level, "first": first, "ranks": ranks, "reason": "soak"}
        answer = requests.post(self.url + "/shift/instances", json=body, timeout=300)
        report: dict[str, Any] = answer.json()
        for each in report.get("changes", []):
            made = "merged" if each["level"] == each["ranks"] else "split"
            self.changes[made if each["ok"] else "given up"] += 1
        if not answer.ok and not report.get("changes"):
            self.changes["refused"] += 1
        return report


def prompts(seed: int, longest: int) -> list[list[int]]:
    """Return prompts of 1 to ``longest`` tokens. Most of them are short, and some fit only a large instance."""
    chooser = random.Random(seed)
    lengths = [int(longest ** chooser.random()) for _ in range(PROMPTS - LONG_PROMPTS)]
    lengths += [chooser.randint(int(0.8 * longest), longest) for _ in range(LONG_PROMPTS)]
    return [chooser.choices(TOKENS, k=length) for length in lengths]


def growth(samples: list[tuple[float, dict[str, int]]]) -> dict[str, float]:
    """Return by how much each process grew from the first to the last sample on the fitted line, as a share."""
    times = np.array([at for at, _ in samples])
    shares = {}
    for name in samples[-1][1]:
        sizes = np.array([sizes.get(name, 0) for _, sizes in samples], dtype=float)
        slope, _ = np.polyfit(times, sizes, 1)
        shares[name] = float(slope * (times[-1] - times[0]) / sizes.mean())
    return shares


def leftovers(soak: Soak, policy: str) -> list[str]:
    """Return what is wrong with a server that has nothing to do any more."""
    wrong = []
    deadline = time.monotonic() + 60
    while True:
        report = requests.get(soak.url + "/shift/instances", timeout=60).json()
        held = sum(each["requests"] for each in report["instances"])
        if not held or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if held:
        wrong.append(f"{held} requests are still counted")
    for level in (soak.ranks, 1) if policy == "fixed" else ():
        after = soak.change(level, 0, soak.ranks)
        if [each["level"] for each in after["instances"]] != [level] * (soak.ranks // level):
            wrong.append(f"idle ranks do not form instances of level {level}: {after.get('error')}")
    return wrong


def soak_seed(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Soak a new server with a seed, and return the report with the verdict."""
    flags = [*FLAGS, "--tp-size", str(args.ranks), "--instances", str(args.ranks), "--instance-policy", args.policy]
    flags += ["--max-total-tokens", str(args.kv_tokens), *args.extra_flags]
    with servers.serving(flags, 0, args.out / f"soak-instances-{seed}.log", args.timeout) as server:
        longest = 3 * args.kv_tokens // 4
        soak = Soak(server.url, seed, args.ranks, prompts(seed, longest), time.monotonic() + 60 * args.minutes)
        started, samples = time.monotonic(), []
        with ThreadPoolExecutor(args.clients + 1) as pool:
            running = [pool.submit(soak.client, number) for number in range(args.clients)]
            running.append(pool.submit(soak.operator))
            while time.monotonic() < soak.ends:
                time.sleep(SAMPLE_S)
                server.check_alive("under random load")
                samples.append((time.monotonic() - started, server.memory()))
            for each in running:
                each.result()
        wrong = leftovers(soak, args.policy)
    late = [sample for sample in samples if sample[0] > args.warm_up * 60 * args.minutes]
    grown = growth(late)
    wrong += [f"{n} requests: {outcome}" for outcome, n in soak.counts.items() if outcome not in GOOD]
    wrong += [f"{name} grew by {share:.1%}" for name, share in grown.items() if share > args.growth]
    if not soak.counts["answered"] or not (soak.changes["merged"] and soak.changes["split"]):
        wrong.append("nothing was answered, or nothing merged and split")
    return {
        "seed": seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "requests": dict(soak.counts),
        "changes": dict(soak.changes),
        "MiB": {name: round(size / 2**20, 1) for name, size in late[-1][1].items()},
        "growth": {name: round(share, 4) for name, share in grown.items()},
        "wrong": wrong,
        "samples": samples,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="minutes of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2, help="P, which is also the number of instances at the start")
    parser.add_argument("--policy", choices=("fixed", "paper", "auto"), default="fixed", help="--instance-policy")
    parser.add_argument("--kv-tokens", type=int, default=2048, help="tokens of the KV cache of all ranks")
    parser.add_argument("--clients", type=int, default=8, help="clients, each with one request at a time")
    parser.add_argument("--warm-up", type=float, default=0.3, help="share of the time whose memory does not count")
    parser.add_argument("--growth", type=float, default=0.02, help="what a process may grow by after that, as a share")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for reports and logs")
    parser.add_argument("extra_flags", nargs="*", metavar="-- FLAG", help="more flags for the server")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    reports = []
    for seed in args.seeds:
        try:
            reports.append(soak_seed(args, seed))
        except Failure as failure:
            sys.exit(f"soak: error: {failure}")
        (args.out / "soak-instances.json").write_text(json.dumps(reports, indent=1) + "\n")
        print(json.dumps({k: v for k, v in reports[-1].items() if k != "samples"}, indent=1), flush=True)
    sys.exit(1 if any(report["wrong"] for report in reports) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
