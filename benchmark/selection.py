#!/usr/bin/env python3
"""Measure the cost of choosing a step's mode: microseconds of ``policy.choose(step)``, and of the whole choice.

    python benchmark/selection.py --calibration FILE

Each policy is timed on the steps that it would meet itself, in the bursty traffic of benchmark/policies.py. The last
line is ``ShiftScheduler.choose_mode``, which runs for every step. It reads the state from a batch of 64 decoding
requests with 1,000 requests waiting, asks the policy, and counts the choice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import repeat
from statistics import median
from time import perf_counter_ns
from types import SimpleNamespace

from policies import Shape, add_server_arguments, policies, read_calibration, server_of, synthetic_traffic
from sglang_shift.cost.model import CostModel
from sglang_shift.modes import ShiftPolicy, StepState
from sglang_shift.simulate.simulator import Server, simulate

LIMIT_US = 50.0


def microseconds(policy: ShiftPolicy, steps: Sequence[StepState], repeats: int = 21) -> tuple[float, float]:
    """Return the median and the 99th percentile of one choice over the steps. Each step counts with its median time.

    The times include the timer's own cost.
    """
    choose = policy.choose
    times = []
    for step in steps:
        taken = []
        for _ in repeat(None, repeats):
            start = perf_counter_ns()
            choose(step)
            taken.append(perf_counter_ns() - start)
        times.append(median(taken) / 1e3)
    times.sort()
    return times[len(times) // 2], times[int(0.99 * len(times))]


def steps_of(policy: ShiftPolicy, costs: CostModel, server: Server, most: int) -> list[StepState]:
    """Return steps that the policy meets in bursty traffic, evenly spread over the run."""
    steps: list[StepState] = []
    [bursty] = [t for t in synthetic_traffic(costs, server, Shape(requests=1000, seeds=1)) if t.name == "bursty"]
    simulate(bursty.samples[0], policy, costs, server, lambda step, _mode, _seconds: steps.append(step))
    return steps[:: max(1, len(steps) // most)]


def whole_choice(policy: ShiftPolicy, repeats: int = 5000) -> float:
    """Return the median microseconds of ``choose_mode``, on a scheduler that has only what ``choose_mode`` reads."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang_shift.graphs.mode_graphs import PhaseGraphs
    from sglang_shift.policy.selector import ModeSelector
    from sglang_shift.runtime.agreement import StepWatch
    from sglang_shift.runtime.chunk_sizer import ChunkSizer
    from sglang_shift.runtime.scheduler import ShiftScheduler

    scheduler = object.__new__(ShiftScheduler)
    scheduler.shift_selector = ModeSelector(policy)
    scheduler.shift_watch = StepWatch(1, None)
    scheduler._agree_on_drift = lambda: None  # one message in 512 steps
    scheduler.is_mixed_chunk, scheduler.server_args = False, SimpleNamespace(enable_mixed_chunk=False)
    scheduler.shift_config = SimpleNamespace(tbt_target=0.0)
    scheduler.shift_chunks = ChunkSizer(scheduler)
    scheduler.shift_width, scheduler.shift_tp_rules = 1, ()
    scheduler.running_batch = SimpleNamespace(batch_size=lambda: 64)
    scheduler.waiting_queue = [SimpleNamespace(seqlen=700) for _ in range(1000)]
    scheduler.chunked_req = None
    graphs = SimpleNamespace(for_phase=lambda prefill: PhaseGraphs())
    scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(graphs=graphs))
    lengths = torch.full((64,), 900)
    reqs = [SimpleNamespace(beam_group=None)] * 64
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=lambda: 64, seq_lens_cpu=lengths, reqs=reqs)
    times = []
    for _ in range(repeats):
        start = perf_counter_ns()
        scheduler.choose_mode(batch)
        times.append(perf_counter_ns() - start)
    return median(times) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--steps", type=int, default=2000, help="steps to time (%(default)s)")
    arguments = parser.parse_args()
    costs, _ = read_calibration(arguments.calibration)
    server = server_of(arguments)
    print("| Policy | Median, us | p99, us |\n|---|--:|--:|")
    slowest = 0.0
    for name, policy in policies(costs, server).items():
        if name.startswith("tokens ") and name != "tokens 256":
            continue  # the threshold makes no difference
        middle, high = microseconds(policy, steps_of(policy, costs, server, arguments.steps))
        slowest = max(slowest, middle)
        print(f"| {name} | {middle:.2f} | {high:.2f} |", flush=True)
    whole = whole_choice(policies(costs, server)["calibrated"])
    print(f"| calibrated, all of choose_mode | {whole:.2f} | |")
    print(f"\nThe slowest policy takes {slowest:.2f} us, choose_mode {whole:.2f} us; the limit is {LIMIT_US:.0f} us.")
    return max(slowest, whole) > LIMIT_US


if __name__ == "__main__":
    sys.exit(main())
