"""Times all-to-all and all-reduce over the links between GPUs, from 8 B to 1 GiB, as CUDA graphs.

Both operations are NCCL's. SGLang's custom all-reduce is timed as well; SGLang's TP groups use it up to some megabytes.
Bandwidth is the bus bandwidth of nccl-tests: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sglang_shift.tools.gpu_check import environment
from sglang_shift.tools.gpu_check.attempts import run_or_record_problem
from sglang_shift.tools.gpu_check.record import Record, Row, one_line
from sglang_shift.tools.gpu_check.timing import capture_graph, collective_seconds
from sglang_shift.tools.tables import text_table

SIZES = tuple(8**power for power in range(1, 11))
"""Bytes of a rank's buffer: 8 B to 1 GiB."""

WORLDS = (2, 4, 8)
ALL_TO_ALL, SGLANG = "all-to-all", "SGLang's all-reduce"
OPERATIONS = (ALL_TO_ALL, "all-reduce", SGLANG)
CALLS_SMALL, CALLS_LARGE, SMALL_BYTES = 20, 3, 1 << 20
"""Calls in a graph: ``CALLS_SMALL`` for buffers of fewer than ``SMALL_BYTES`` bytes, and ``CALLS_LARGE`` for others.

With many calls, the overhead of a replay does not count.
"""


def check(record: Record) -> None:
    """Time groups of 2, 4 and 8 GPUs, if there are enough GPUs. Each operation runs in new ranks."""
    for world in (size for size in WORLDS if size <= environment.gpus()):
        rows: list[Row] = []
        for operation in OPERATIONS:
            label, devices = f"{world} GPUs, {operation}", [f"cuda:{i}" for i in range(world)]
            for row in run_or_record_problem(record, label, sweep, devices, "nccl", operation) or ():
                if "skipped" in row:
                    record.note(f"{label}: skipped: {row['skipped']}")
                else:
                    rows.append(record.row(**row))
        record.note(table(world, rows))


def sweep(device: torch.device, operation: str) -> list[Row]:
    """Run one rank's part: an operation of :data:`OPERATIONS` at every size."""
    if operation != SGLANG:
        return list(_measure(operation, _all_to_all if operation == ALL_TO_ALL else dist.all_reduce, device))
    try:
        custom = custom_all_reduce(device)
    except Exception as error:  # its libraries raise errors of any type
        return [{"skipped": one_line(error)}]
    return list(_measure(operation, custom.custom_all_reduce, device, custom))


def _repeat(call: Callable[[torch.Tensor], Any], x: torch.Tensor, calls: int) -> list[Any]:
    return [call(x) for _ in range(calls)]


def _measure(name: str, call: Callable[[torch.Tensor], Any], device: torch.device, custom: Any = None) -> Iterator[Row]:
    world = dist.get_world_size()
    for size in SIZES:
        x = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        if size % (2 * world) and name == ALL_TO_ALL:
            x = torch.zeros(size, dtype=torch.uint8, device=device)
        if custom is not None and not custom.should_custom_ar(x):
            continue
        calls = CALLS_SMALL if size < SMALL_BYTES else CALLS_LARGE
        with nullcontext() if custom is None else custom.capture():
            graph, _ = capture_graph(partial(_repeat, call, x, calls))
        seconds = collective_seconds(graph.replay, device) / calls
        row: Row = {"operation": name, "ranks": world, "bytes": size, "us": round(1e6 * seconds, 2)}
        yield row | {"bus_gb_per_s": round(bus_share(name, world) * size / seconds / 1e9, 2)}


def bus_share(operation: str, world: int) -> float:
    """Return the bytes that cross a rank's link for each byte of its buffer, as nccl-tests count them."""
    return (1 if operation == ALL_TO_ALL else 2) * (world - 1) / world


def _all_to_all(x: torch.Tensor) -> torch.Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def custom_all_reduce(device: torch.device) -> Any:
    """Make SGLang's communicator over all ranks. All ranks must call this function."""
    from sglang.srt.distributed.device_communicators.custom_all_reduce import dispatch_custom_allreduce

    group = dist.new_group(backend="gloo")
    communicator = dispatch_custom_allreduce(group=group, device=device)(group=group, device=device)
    if communicator.disabled:
        raise RuntimeError("it is disabled between these GPUs")
    return communicator


def table(world: int, rows: list[Row]) -> str:
    """Return a table of microseconds by size and operation."""
    names = list(dict.fromkeys(row["operation"] for row in rows))
    times = {(row["operation"], row["bytes"]): row["us"] for row in rows}
    sizes = sorted({row["bytes"] for row in rows})
    body = [[size, *(times.get((name, size), "") for name in names)] for size in sizes]
    return text_table([[f"{world} GPUs: bytes", *(f"{name}, us" for name in names)], *body])
