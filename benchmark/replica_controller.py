#!/usr/bin/env python3
"""Measure what stock SGLang's controller of replicas takes from the replicas on a machine with few cores.

    sudo python benchmark/replica_controller.py --model-path DIR --link-rate 387e6

Two contenders get all requests of the benchmark's saturated workload at once: stock DP and SP, with two ranks each.
Stock DP is measured twice: with its controller as it is, and with the controller at the lowest priority. Each line has
the throughput, and the CPU seconds of the ranks and of the controller.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from sglang_shift.tools.benchmark import options
from sglang_shift.tools.benchmark.client import Client
from sglang_shift.tools.benchmark.contenders import DP_CONTROLLER, parse_contender
from sglang_shift.tools.benchmark.environment import describe_model
from sglang_shift.tools.benchmark.link import Link, start_on
from sglang_shift.tools.benchmark.workloads import Workload
from sglang_shift.tools.servers import Server, start

RANKS, KV_TOKENS = 2, 49152
WORDS = ("--prompt", "128", "1024", "--output", "8", "32", "--saturated", "48")
FLAGS = ("--sleep-on-idle", "--dtype", "bfloat16")
RANK = "sglang::scheduler"


def cpu_seconds(server: Server) -> Counter[str]:
    """Return the CPU seconds of each process of a server so far, by its title."""
    seconds: Counter[str] = Counter()
    for root in server.processes:
        for process in psutil.Process(root.pid).children(recursive=True):
            try:
                seconds[" ".join(process.cmdline()[:1])] += sum(process.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
    return seconds


def measure(name: str, server: Server, client: Client, workload: Workload, seed: int) -> None:
    """Send the workload, and print a line."""
    server.flush()
    time.sleep(1)
    before = cpu_seconds(server)
    records = client.run(workload, seed)
    used = cpu_seconds(server) - before
    seconds = max(r.end for r in records) - min(r.sent for r in records)
    ranks = ", ".join(f"{each:.1f}" for title, each in sorted(used.items()) if title.startswith(RANK))
    tokens = sum(r.prompt + r.output for r in records) / seconds
    print(f"{name}: {tokens:.0f} tokens/s, {seconds:.1f} s; CPU s: ranks {ranks}; controller {used[DP_CONTROLLER]:.1f}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--link-rate", type=float, required=True, help="bits per second of the link of SP")
    parser.add_argument("--times", type=int, default=2)
    args = parser.parse_args(argv)
    model = describe_model(args.model_path)
    workload = options.plan(options.parse(WORDS), model["context"]).saturated()
    for name in ("stock-dp", "sp"):
        contender = parse_contender(name, RANKS, kv_tokens=KV_TOKENS)
        flags = [*contender.flags, *FLAGS, "--model-path", args.model_path]
        log = Path(tempfile.mkdtemp(), f"{name}.log")
        link = Link(RANKS, args.link_rate) if contender.ranks > 1 else None
        server = start_on(link, flags, 0, log) if link else start(flags, 0, log)
        try:
            server.wait_until_healthy(600)
            client = Client(server.url, "sglang", "default", model["vocabulary"], 600)
            client.run(workload, -1)
            for seed in range(args.times):
                measure(name, server, client, workload, seed)
            if contender.busy_loop:
                server.lower_priority(contender.busy_loop)
                for seed in range(args.times):
                    measure(f"{name}, its controller at the lowest priority", server, client, workload, seed)
        finally:
            server.stop()
            if link:
                link.close()


if __name__ == "__main__":
    main(sys.argv[1:])
