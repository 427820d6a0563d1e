"""Checks SGLang's bfloat16 GEMM kernels (``--bf16-gemm-backend``) on views of base weights.

Each backend supports some shapes and GPUs only. Some kernels read a weight as if its rows were adjacent, or refuse a
weight whose rows are not adjacent. In TP the O and down projections pass views whose rows are not adjacent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sglang_shift.args.gemm_backend import adjust_gemm_backend
from sglang_shift.tools.gpu_check.gemms import TOLERANCE, random_rows, random_weight
from sglang_shift.tools.gpu_check.record import Record, one_line
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, Matrix
from sglang_shift.tools.gpu_check.timing import error_of

BACKENDS = ("auto", "gemv", "cutedsl")
"""The backends to check. ``auto`` is the server's default."""

ROWS = (1, 2, 8, 16, 48, 64, 512)
"""Numbers of rows. SGLang's tables have special kernels for some of these numbers, and none for the others."""


def check(record: Record) -> None:
    """Check each backend that this GPU supports, on each view of the deployments.

    Raises:
        Refused: the environment asks for split-K products, with which no server of ours starts.
    """
    from sglang.srt.layers.quantization import unquant

    backends = []
    for name in BACKENDS:
        adjust_gemm_backend("cuda", name)  # as a server does, which never runs split-K products
        try:
            with backend(unquant, name):
                check_views(record, unquant._bf16_gemm_dispatch_impl, name, torch.device("cuda"))
            backends.append(name)
        except pytest.skip.Exception as reason:
            record.note(f"{name}: skipped: {reason}")
    record.note(f"checked: {', '.join(backends)}")


@contextmanager
def backend(unquant: ModuleType, name: str) -> Iterator[None]:
    """Initialize SGLang's module of unquantized layers as with ``--bf16-gemm-backend name``, for a ``with`` block.

    Raises:
        pytest.skip.Exception: the GPU or the installed packages do not support this backend.
    """
    before = dict(vars(unquant))
    config = SimpleNamespace(
        kernel=SimpleNamespace(bf16_gemm_backend=name),
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
    )
    vars(unquant)["get_exec"] = lambda: config
    try:
        try:
            unquant.initialize_bf16_gemm_config()
        except (ImportError, ValueError) as error:
            pytest.skip(one_line(error))
        yield
    finally:
        vars(unquant).update(before)


def views() -> list[Matrix]:
    """Return the shards that are views of their base weights. Each shape occurs once."""
    return list(dict.fromkeys(shard for d in DEPLOYMENTS for shard in d.shards.values() if shard.is_view))


def check_views(record: Record, multiply: Callable[..., torch.Tensor], name: str, device: torch.device) -> None:
    """Compare ``multiply(x, view, None)`` with a product in float32."""
    for view in views():
        weight = random_weight(Matrix(view.outputs, view.stride, view.stride), torch.bfloat16, device)[:, : view.inputs]
        for rows in ROWS:
            x = random_rows(rows, view.inputs, torch.bfloat16, device)
            label = f"{name}: {rows} rows times {view}"
            try:
                error = error_of(multiply(x, weight, None), x.float() @ weight.float().T)
            except Exception as refusal:  # each kernel raises its own type of error, and any error ends a step
                record.problem(f"{label}: {one_line(refusal)}")
                continue
            record.row(backend=name, n=view.outputs, k=view.inputs, stride=view.stride, m=rows, error=error)
            if not error <= TOLERANCE:
                record.problem(f"{label}: differs by {error:.2g} of its norm")
