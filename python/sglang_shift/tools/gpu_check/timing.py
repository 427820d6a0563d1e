"""How long calls take on a device, and CUDA graphs of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from triton.testing import do_bench

Call = Callable[[], Any]

WARM_UP_MS, MEASURE_MS = 5, 20
"""Of ``do_bench``: hundreds of calls of all sizes are timed, in a minute or two."""

WARM_UPS, RUNS = 3, 12
L2_BYTES = 64 << 20
"""Where PyTorch does not say how large the L2 cache is."""


def seconds_of(call: Call, device: torch.device) -> float:
    """The median time of a call: by ``do_bench`` on a GPU, with a cold L2 cache; by the clock on a CPU.

    Weights of a rank may fit the L2 cache, and no step of a model finds them there.
    """
    if device.type == "cuda":
        return do_bench(call, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median") / 1e3
    return _by_the_clock(call)


def collective_seconds(call: Call, device: torch.device) -> float:
    """The same of a call that waits for other ranks.

    ``do_bench`` cannot time it: it takes as many calls as fit a time by its first estimate, which differs from rank to
    rank, and a rank that calls once more than another waits for ever. Here all ranks make the same number of calls.
    """
    if device.type != "cuda":
        return _by_the_clock(call)
    for _ in range(WARM_UPS):
        call()
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)
    cold = torch.empty(4 * size, dtype=torch.int8, device=device)
    laps = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cold.zero_()  # so long that the call is queued before it ends
        start.record()
        call()
        end.record()
        laps.append((start, end))
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in laps) / 1e3


def _by_the_clock(call: Call) -> float:
    for _ in range(WARM_UPS):
        call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def copy_seconds(size: int, device: torch.device) -> float:
    """A copy on the device that moves ``size`` bytes: half of them read, half written."""
    source = torch.empty(size // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)


def capture_graph(call: Call, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the call, and what it returned; replays write there.

    Args:
        call: Run twice before, on a stream of its own, as PyTorch's notes on graphs ask.
        pool: Memory of another graph, to be shared.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of ``expected``; NaN where there is one."""
    expected = expected.float()
    return float((result.float() - expected).norm() / expected.norm())
