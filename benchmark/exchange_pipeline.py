#!/usr/bin/env python3
"""Compare the pipelined exchange with the ordinary exchange, on emulated links of several rates. Needs root.

    python benchmark/make_model.py DIR --layers 3 --hidden-size 2048 --intermediate-size 5376 --heads 16 --kv-heads 4
    python benchmark/exchange_pipeline.py --model-path DIR --rates 387e6 92e6 52e6

For each rate, the ranks load the model once, and run SP prefills in both ways in turns (docs/emulated-link.md describes
the link). The time of a step is that of the slowest rank. Each row has the median times, the median of the ratios of
neighbouring steps, and the smallest and the largest ratio. A ratio above 1 means that the pipelined exchange is faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test/support"))

HEADER = "| Link, Mbit/s | Tokens | Prefix | Ordinary, ms | Pipelined, ms | Ratio | from | to |"


def flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a rank's model runner."""
    most = max(tokens + prefix for tokens, prefix in args.shapes)
    return [
        "--model-path", args.model_path, "--tp-size", str(args.ranks), "--sp-size", str(args.ranks),
        "--enable-shift-parallel", "--shift-policy", "sp", "--shift-exchange-pipeline", "on", "--device", "cpu",
        "--skip-tokenizer-init", "--disable-radix-cache", "--disable-cuda-graph", "--max-running-requests", "4",
        "--max-total-tokens", str(2 * most), "--chunked-prefill-size", str(most), "--nnodes", str(args.ranks),
        "--node-rank", str(args.rank), "--dist-init-addr", args.address,
    ]  # fmt: skip


def run_rank(args: argparse.Namespace) -> None:
    """Build this rank's model runner, and time all shapes. Rank 0 prints a row for each shape."""
    import model_trial
    import torch
    from sglang_shift import seams
    from sglang_shift.parallel.exchange import head_groups

    head_groups.MAX_GROUPS = args.groups
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # SGLang wants the cores of each rank, and each rank is alone on its node.
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join([os.environ["SGLANG_CPU_OMP_THREADS_BIND"]] * args.ranks)
    task = model_trial.Task(tuple(flags(args)), (), stock=False, port=model_trial.free_port())
    server_args = model_trial.resolve(task)
    seams.install()
    runner = model_trial.build_runner(args.rank, task, server_args)
    assert runner.exchange_pipeline.groups.count == args.groups, "the model has fewer groups than --groups"
    for tokens, prefix in args.shapes:
        time_both(runner, tokens, prefix, 1)
        rounds = time_both(runner, tokens, prefix, args.rounds)
        ratios = sorted(ordinary / pipelined for ordinary, pipelined in rounds)
        ordinary, pipelined = (1e3 * median(times) for times in zip(*rounds, strict=True))
        if args.rank == 0:
            rate = f"{args.rate / 1e6:.0f}" if args.rate else "no limit"
            print(
                f"| {rate} | {tokens} | {prefix} | {ordinary:.0f} | {pipelined:.0f} | {median(ratios):.3f} "
                f"| {ratios[0]:.3f} | {ratios[-1]:.3f} |",
                flush=True,
            )


def time_both(runner: Any, tokens: int, prefix: int, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of the ordinary and of the pipelined exchange in each round."""
    import torch
    import torch.distributed as dist

    pairs = []
    for _ in range(rounds):
        seconds = torch.zeros(2, dtype=torch.float64)
        for way, first in enumerate((None, 1)):
            with runner.exchange_pipeline.starting_at(first):
                seconds[way] = seconds_of(runner, tokens, prefix)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        pairs.append((float(seconds[0]), float(seconds[1])))
    return pairs


def seconds_of(runner: Any, tokens: int, prefix: int) -> float:
    """Run a prefill of ``tokens`` after ``prefix`` cached ones, and return its seconds."""
    import torch.distributed as dist
    from model_trial import extended
    from sglang.benchmark import one_batch
    from sglang_shift.modes import Mode

    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests: dict[int, Any] = {}
    seconds = 0.0
    for new in filter(None, (prefix, tokens)):
        request = extended(requests, 0, [3 + i % 97 for i in range(new)])
        dist.barrier()
        begin = time.perf_counter()
        with runner.running_in(Mode.SP):
            one_batch.extend([request], runner)
        seconds = time.perf_counter() - begin
    return seconds


def run_link(args: argparse.Namespace, rate: float | None) -> None:
    """Run the ranks on a link of a rate."""
    from sglang_shift.tools.benchmark.link import Link

    mine = ["--model-path", args.model_path, "--ranks", str(args.ranks), "--rounds", str(args.rounds)]
    mine += ["--groups", str(args.groups), "--shapes", *(f"{tokens}+{prefix}" for tokens, prefix in args.shapes)]
    with Link(args.ranks, rate) as link:
        processes = []
        for rank in range(args.ranks):
            where = ["--rank", str(rank), "--address", link.rendezvous, "--rate", str(rate or 0)]
            command = link.command(rank, [sys.executable, __file__, *mine, *where])
            log = None if args.verbose else subprocess.DEVNULL
            processes.append(subprocess.Popen(command, env=os.environ | link.environment(rank), stderr=log))
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            time.sleep(0.2)
        if any(process.returncode for process in processes):
            sys.exit("exchange_pipeline: a rank failed; add --verbose to see why")


def parse_shape(text: str) -> tuple[int, int]:
    tokens, _, prefix = text.partition("+")
    return int(tokens), int(prefix or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[387e6, 92e6, 52e6], help="bit/s; 0 for no limit")
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=[(512, 0), (2048, 0)],
        help="TOKENS or TOKENS+PREFIX of each step",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=4, help="the most groups of heads")
    parser.add_argument("--verbose", action="store_true", help="show the logs of the ranks")
    for name, kind in (("rank", int), ("address", str), ("rate", float)):  # of a rank's own process
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args)
        return
    print(HEADER + "\n|" + "---|" * HEADER.count(" | ") + "---|", flush=True)
    for rate in args.rates:
        run_link(args, rate or None)


if __name__ == "__main__":
    main()
