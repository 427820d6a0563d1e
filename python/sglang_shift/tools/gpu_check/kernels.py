"""Checks the kernels that pack and unpack an exchange, and compares their bandwidth with a device copy's bandwidth."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS
from sglang_shift.tools.gpu_check.timing import copy_seconds, seconds_of

ROWS = (1, 16, 128, 1024, 4096)
"""Numbers of tokens of a rank."""

PACKAGE = "sglang_shift_kernels"


def check(record: Record) -> None:
    """Check each operation that packs or unpacks a bfloat16 exchange, plain and as fp8."""
    try:
        import sglang_shift_kernels as kernels
        from sglang_shift_kernels import gpu, operations, reference
    except ImportError as error:
        pytest.skip(f"{PACKAGE} cannot be imported ({error}); put the folder kernels on PYTHONPATH")
    device = torch.device("cuda")
    fp8 = kernels.fp8_supported(device)
    if not fp8:
        record.note("fp8: skipped: this GPU has no instruction that makes e4m3")
    shares = defaultdict(list)
    for (size, qkv, o), model in exchanges().items():
        for rows in ROWS:
            shape = operations.ExchangeShape(size, rows, qkv, o)
            for operation in operations.operations(shape, torch.bfloat16, device):
                if fp8 or "fp8" not in operation.name:
                    labels = {"operation": operation.name, "model": model, "ranks": size, "rows": rows}
                    row = measure(record, labels, operation, (gpu, reference, operations.traffic), device)
                    if row and rows == ROWS[-1]:
                        shares[operation.name].append(row["share of a copy"])
    for name, values in shares.items():
        record.note(f"{name}: {min(values):.2f} to {max(values):.2f} of a copy's bandwidth at {ROWS[-1]} rows")


def exchanges() -> dict[tuple[int, int, int], str]:
    """Return S, the QKV columns and the O columns of a rank, each with the first model that has these sizes."""
    models: dict[tuple[int, int, int], str] = {}
    for deployment in DEPLOYMENTS:
        models.setdefault((deployment.sp, *deployment.widths), deployment.model)
    return models


def measure(
    record: Record, labels: dict[str, Any], operation: Any, modules: tuple[Any, Any, Any], device: torch.device
) -> dict[str, Any] | None:
    """Check one operation. Time the operation unless its result is a view."""
    gpu, reference, traffic_of = modules
    result = operation.run(gpu)
    if not torch.equal(result, operation.run(reference)):
        record.problem(f"{labels}: not what the reference gives")
        return None
    traffic = traffic_of(operation.arguments[0], result)
    if not traffic.total_bytes:
        return None
    seconds, copy = seconds_of(lambda: operation.run(gpu), device), copy_seconds(traffic.total_bytes, device)
    figures = {
        "us": 1e6 * seconds,
        "GB/s": traffic.total_bytes / seconds / 1e9,
        "copy GB/s": traffic.total_bytes / copy / 1e9,
    }
    return record.row(
        **labels,
        bytes=traffic.total_bytes,
        **{name: round(value, 2) for name, value in figures.items()},
        **{
            "share of a copy": round(copy / seconds, 3),
            "of the minimum": round(traffic.total_bytes / traffic.minimum, 3),
        },
    )
