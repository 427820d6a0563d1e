"""How long calls take on a device, and CUDA graphs of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]

WARM_UPS, RUNS = 3, 12
L2_BYTES = 64 << 20
"""Where PyTorch does not say how large the L2 cache is."""


class Timer:
    """Times calls: by events on the stream of a GPU, with a cold L2 cache; by the clock on a CPU.

    Weights of a rank may fit the L2 cache, and no step of a model finds them there.

    Args:
        device: Where the calls work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", L2_BYTES)
            self._cold = torch.empty(4 * size, dtype=torch.int8, device=device)

    def seconds(self, call: Call, runs: int = RUNS) -> float:
        """The median of ``runs`` calls, after some that do not count."""
        for _ in range(WARM_UPS):
            call()
        return median(self._on_gpu(call, runs) if self.device.type == "cuda" else self._on_cpu(call, runs))

    def _on_gpu(self, call: Call, runs: int) -> list[float]:
        laps = []
        for _ in range(runs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._cold.zero_()  # so long that the call is queued before it ends
            start.record()
            call()
            end.record()
            laps.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in laps]

    @staticmethod
    def _on_cpu(call: Call, runs: int) -> list[float]:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def copy_seconds(self, size: int) -> float:
        """A copy on the device that moves ``size`` bytes: half of them read, half written."""
        source = torch.empty(size // 2, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return self.seconds(lambda: target.copy_(source))


def captured(call: Call, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
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
