#!/usr/bin/env python3
"""Measure how fast an exchange is packed and unpacked.

    python benchmark/kernels.py [--device cpu] [--json FILE]

On a GPU, it runs each Triton kernel at the shapes of one rank, and checks it against the reference. It divides the
bytes that the kernel moves by its time. It reports this rate as a share of the rate of a device copy that moves the
same number of bytes in the same run. It also reports PyTorch's time for the same operation. Times are medians of events
on the stream, with a cold L2 cache.

On a CPU, it compares the ways that PyTorch has, on one thread; "ours" is the way of sglang_shift_kernels.cpu. The ways
take turns, and times are medians.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from sglang_shift_kernels import cpu, fp8_supported, reference
from sglang_shift_kernels.operations import ExchangeShape, Operation, operations, traffic
from torch_ways import WAYS

# By model: S, then the columns of QKV and of O for one rank (its heads and KV heads times 128).
SHAPES = {"Llama-3-8B, S=2": (2, 3072, 2048), "Qwen2.5-32B, S=8": (8, 896, 640), "Llama-3-70B, S=8": (8, 1280, 1024)}
ROWS = {"cuda": (1, 16, 128, 1024, 4096), "cpu": (1, 8, 64, 512)}
ROUNDS = 7


def examples(device: str, dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[dict[str, Any], Operation]]:
    for model, (size, qkv, o) in SHAPES.items():
        for dtype in dtypes:
            for rows in ROWS[device]:
                for operation in operations(ExchangeShape(size, rows, qkv, o), dtype, device):
                    if "fp8" in operation.name and not fp8_supported(torch.device(device)):
                        continue
                    labels = {"model": model, "rows": rows, "dtype": str(dtype).removeprefix("torch.")}
                    yield {**labels, "operation": operation.name}, operation


def on_gpu() -> Iterator[dict[str, Any]]:
    from sglang_shift_kernels import gpu
    from triton.testing import do_bench

    def milliseconds(call: Callable[[], Any]) -> float:
        return do_bench(call, return_mode="median")

    for labels, operation in examples("cuda", (torch.bfloat16,)):
        result, source = operation.run(gpu), operation.arguments[0]
        if not torch.equal(result, operation.run(reference)):
            raise SystemExit(f"{labels}: not what the reference gives")
        if not (kernel_traffic := traffic(source, result)).total_bytes:
            continue  # a view
        copied = torch.empty(kernel_traffic.total_bytes // 2, dtype=torch.uint8, device="cuda")
        kernel = milliseconds(lambda o=operation: o.run(gpu))
        copy = milliseconds(partial(torch.empty_like(copied).copy_, copied))
        yield {
            **labels,
            "us": round(1e3 * kernel, 1),
            "GB/s": round(kernel_traffic.total_bytes / kernel / 1e6),
            "of a copy": round(copy / kernel, 2),
            "of the minimum": round(kernel_traffic.total_bytes / kernel_traffic.minimum, 3),
            "PyTorch, us": round(1e3 * milliseconds(lambda o=operation: o.run(reference)), 1),
        }


def on_cpu() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    for labels, operation in examples("cpu", (torch.bfloat16, torch.float32)):
        expected = operation.run(cpu)
        ways = {"ours": partial(operation.run, cpu)}
        for name, way in WAYS[operation.name].items():
            ways[name] = partial(way, *operation.arguments)
            if not torch.equal(ways[name](), expected):
                raise SystemExit(f"{labels}: {name} gives something else")
        yield {**labels, **{name: round(us, 1) for name, us in in_turns(ways).items()}}


def in_turns(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the microseconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    start = perf_counter()
    for way in ways.values():
        way()
    calls = max(1, int(0.005 * len(ways) / (perf_counter() - start)))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = perf_counter()
            for _ in range(calls):
                way()
            times[name].append((perf_counter() - start) / calls * 1e6)
    return {name: median(each) for name, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    rows = []
    print(torch.cuda.get_device_name() if arguments.device == "cuda" else "One thread of this machine's CPU")
    for row in on_gpu() if arguments.device == "cuda" else on_cpu():
        rows.append(row)
        print(", ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in row.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
