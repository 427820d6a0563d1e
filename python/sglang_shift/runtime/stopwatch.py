"""Measure the time of a step: with the clock on a CPU, with events on the stream on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Lap:
    """One timed span.

    Attributes:
        start: Monotonic seconds, or a CUDA event.
        end: Monotonic seconds, or a CUDA event; None while the span runs.
    """

    start: Any
    end: Any = None

    @property
    def seconds(self) -> float | None:
        """How long the span took; None while it runs, or until the GPU has reached its end."""
        if self.end is None:
            return None
        if isinstance(self.start, float):
            return self.end - self.start
        return self.start.elapsed_time(self.end) / 1e3 if self.end.query() else None


class Stopwatch:
    """Times spans, and does not wait for the device.

    The clock is monotonic, so a change of the wall clock has no effect on it.
    """

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()

    @contextmanager
    def lap(self) -> Iterator[Lap]:
        """Time the body, on the current stream."""
        lap = Lap(self._now())
        try:
            yield lap
        finally:
            lap.end = self._now()

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
