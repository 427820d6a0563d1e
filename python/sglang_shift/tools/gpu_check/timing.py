"""Times calls on a device, and captures CUDA graphs of calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from triton.testing import do_bench

Call = Callable[[], Any]

WARM_UP_MS, MEASURE_MS = 5, 20
"""Arguments of ``do_bench``. With these times, a minute or two is enough for hundreds of calls of all sizes."""

WARM_UPS, RUNS = 3, 12
L2_BYTES = 64 << 20
"""The size of the L2 cache if PyTorch does not report it."""


def seconds_of(call: Call, device: torch.device) -> float:
    """Return the median time of a call. On a GPU ``do_bench`` measures it, on a CPU the clock.

    On a GPU the L2 cache is cold. The weights of a rank might fit into it, but no step of a model finds them there.
    """
    if device.type == "cuda":
        return do_bench(call, warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median") / 1e3
    return _by_the_clock(call)


def collective_seconds(call: Call, device: torch.device) -> float:
    """Return the median time of a call that waits for other ranks.

    ``do_bench`` cannot time such a call. It estimates how many calls fit into a given time, and the estimate differs
    from rank to rank. A rank that calls once more than another rank waits for ever. Here all ranks make the same number
    of calls.
    """
    if device.type != "cuda":
        return _by_the_clock(call)
    for _ in range(WARM_UPS):
        call()
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)
    l2_flush = torch.empty(4 * size, dtype=torch.int8, device=device)
    event_pairs = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        l2_flush.zero_()  # this takes so long that the call is queued before it ends
        start.record()
        call()
        end.record()
        event_pairs.append((start, end))
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in event_pairs) / 1e3


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
    """Return the time of a copy on the device that moves ``size`` bytes: it reads one half and writes the other."""
    source = torch.empty(size // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)


def capture_graph(call: Call, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a CUDA graph of a call. Return the graph and the result of the call, which replays overwrite.

    Args:
        call: The call. It runs twice before the capture, on another stream, as PyTorch's notes on graphs ask.
        pool: The memory pool of another graph, which the graph shares.
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
    """Return the norm of the difference over the norm of ``expected``. It is NaN if a tensor has a NaN."""
    result, expected = result.detach(), expected.detach().float()
    return float((result.float() - expected).norm() / expected.norm())
