#!/usr/bin/env python3
"""The cost of choosing the same mode on all ranks: microseconds, over gloo, with ranks that do nothing else.

    python benchmark/agreement.py --ranks 2 4

It times three things: the broadcast of a policy's answer (`agreement.from_rank_0`), SGLang's own broadcast of no
requests, and `agreement.StepWatch`. The watch is timed for each step, and each time that rank 0 tells and another rank
compares.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sglang.srt.utils import broadcast_pyobj
from sglang_shift.modes import Mode
from sglang_shift.runtime import agreement
from sglang_shift.tools.servers import free_port

LAPS = 2000


def microseconds(run: Callable[[], object], laps: int = LAPS) -> float:
    """Return the median time of ``laps`` calls."""
    times = []
    for _ in range(laps):
        start = perf_counter_ns()
        run()
        times.append(perf_counter_ns() - start)
    return median(times) / 1e3


def time_watch(watch: agreement.StepWatch) -> float:
    """Return the time to tell or compare once after a step. All ranks do it together, so each finds something new."""
    times = []
    for _ in range(200):
        watch.record(64, 0, Mode.TP)
        dist.barrier()
        if watch._rank == 0:
            start = perf_counter_ns()
            watch.compare()
            times.append(perf_counter_ns() - start)
        dist.barrier()
        if watch._rank > 0:
            start = perf_counter_ns()
            watch.compare()
            times.append(perf_counter_ns() - start)
    return median(times) / 1e3


def measure(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    group = SimpleNamespace(ranks=list(range(size)), cpu_group=dist.group.WORLD)
    agreement.get_parallel = lambda: SimpleNamespace(tp_group=group)  # type: ignore[attr-defined]
    watch = agreement.StepWatch(rank, dist.PrefixStore("watch", dist.distributed_c10d._get_default_store()))
    answer = microseconds(lambda: agreement.from_rank_0([1.0]))
    requests = microseconds(lambda: broadcast_pyobj([], rank, dist.group.WORLD, src=0))
    note = microseconds(lambda: watch.record(64, 0, Mode.TP), 20_000)
    times_by_rank: list[float | None] = [None] * size
    dist.all_gather_object(times_by_rank, time_watch(watch))
    if rank == 0:
        print(f"{size:5d} {answer:17.0f} {requests:16.0f} {note:14.2f} {times_by_rank[0]:6.0f} {times_by_rank[1]:9.0f}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="What it costs that ranks choose alike.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default: 2 4")
    sizes = parser.parse_args().ranks
    print("ranks  answer broadcast  SGLang's of none  noting a step  tells  compares   (microseconds, medians)")
    for size in sizes:
        # The ranks are forked: a spawned rank would import SGLang again.
        mp.start_processes(measure, (size, free_port()), nprocs=size, start_method="fork")


if __name__ == "__main__":
    main()
