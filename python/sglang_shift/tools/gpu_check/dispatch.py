"""Checks SGLang's bfloat16 GEMM kernels (``--bf16-gemm-backend``) on views of base weights.

Each backend supports some shapes and GPUs only. Some kernels read a weight as if its rows were adjacent, or refuse a
weight whose rows are not adjacent. In TP the O and down projections pass views whose rows are not adjacent.

For many weights SGLang takes no kernel of its own, but cuBLAS. So the check also finds out which kernel computed each
product, and multiplies with a contiguous copy of each view. If SGLang's kernel ran for no copy, the check does not show
what it would do with a view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

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

KERNELS = {"_hopper_bf16_gemv": "gemv", "_cutedsl_bf16_gemm": "cutedsl"}
"""The name of each of SGLang's own kernels, by the name in its module that is None without this kernel."""
CUBLAS = "cuBLAS"
PACKED_ONLY = ("gemv",)
"""Kernels that read a weight as if its rows were adjacent. SGLang must not run them on a view."""

Multiply = Callable[[torch.Tensor, torch.Tensor, None], torch.Tensor]


def check(record: Record) -> None:
    """Check each backend that this GPU supports, on each view of the deployments.

    Raises:
        pytest.skip.Exception: it supports none.
        Refused: the environment asks for split-K products, with which no server of ours starts.
    """
    from sglang.srt.layers.quantization import unquant

    backends = []
    for name in BACKENDS:
        adjust_gemm_backend("cuda", name)  # as a server does, which never runs split-K products
        try:
            with backend(unquant, name) as calls:
                check_views(record, unquant._bf16_gemm_dispatch_impl, calls, name, torch.device("cuda"))
                check_reach(record, name, [kernel for key, kernel in KERNELS.items() if vars(unquant)[key] is not None])
            backends.append(name)
        except pytest.skip.Exception as reason:
            record.note(f"{name}: skipped: {reason}")
    record.note(f"checked: {', '.join(backends) or 'nothing'}")
    if not backends:
        pytest.skip("no backend was checked: this GPU or this environment supports none")


@contextmanager
def backend(unquant: ModuleType, name: str) -> Iterator[list[str]]:
    """Initialize SGLang's module of unquantized layers as with ``--bf16-gemm-backend name``, for a ``with`` block.

    Yields:
        A list to which each call of one of SGLang's own kernels adds the kernel's name.

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
        calls: list[str] = []
        for key, kernel in KERNELS.items():
            if (function := vars(unquant)[key]) is not None:
                vars(unquant)[key] = counted(function, kernel, calls)
        yield calls
    finally:
        vars(unquant).update(before)


def counted(function: Callable[..., torch.Tensor], name: str, calls: list[str]) -> Callable[..., torch.Tensor]:
    """Return the function, which from now on adds ``name`` to ``calls``."""

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def views() -> list[Matrix]:
    """Return the shards that are views of their base weights. Each shape occurs once."""
    return list(dict.fromkeys(shard for d in DEPLOYMENTS for shard in d.shards.values() if shard.is_view))


def check_views(record: Record, multiply: Multiply, calls: list[str], name: str, device: torch.device) -> None:
    """Compare ``multiply(x, weight, None)`` with a product in float32, for each view and for its contiguous copy.

    Args:
        record: The record for problems and for the kernel of each product.
        multiply: SGLang's product. It adds the names of SGLang's own kernels to ``calls``.
        calls: As :func:`backend` yields it.
        name: The backend.
        device: Where the weights are.
    """
    for matrix in views():
        base = random_weight(Matrix(matrix.outputs, matrix.stride, matrix.stride), torch.bfloat16, device)
        view = base[:, : matrix.inputs]
        for held, weight in (("view", view), ("copy", view.contiguous())):
            for rows in ROWS:
                x = random_rows(rows, matrix.inputs, torch.bfloat16, device)
                label = f"{name}: {rows} rows times {matrix} ({held})"
                calls.clear()
                try:
                    error = error_of(multiply(x, weight, None), x.float() @ weight.float().T)
                except Exception as refusal:  # each kernel raises its own type of error, and any error ends a step
                    record.problem(f"{label}: {one_line(refusal)}")
                    continue
                kernel = calls[0] if calls else CUBLAS
                shape = {"n": matrix.outputs, "k": matrix.inputs, "stride": matrix.stride, "m": rows}
                record.row(backend=name, held=held, **shape, kernel=kernel, error=error)
                if not error <= TOLERANCE:
                    record.problem(f"{label}: differs by {error:.2g} of its norm")
                if held == "view" and kernel in PACKED_ONLY:
                    record.problem(f"{label}: {kernel} runs, which wants adjacent rows")


def check_reach(record: Record, name: str, kernels: list[str]) -> None:
    """Note which products SGLang's own kernels computed, and record a problem if they computed none of a copy.

    Args:
        record: The record, with the rows of :func:`check_views`.
        name: The backend.
        kernels: SGLang's own kernels that this backend has.
    """
    counts: dict[str, Counter[str]] = {"view": Counter(), "copy": Counter()}
    for row in record.rows:
        if row["backend"] == name:
            counts[row["held"]][row["kernel"]] += 1
    for held, by_kernel in counts.items():
        text = ", ".join(f"{count} by {kernel}" for kernel, count in by_kernel.items())
        record.note(f"{name}: products with a {held}: {text or 'none'}")
    for kernel in kernels:
        if not counts["copy"][kernel]:
            record.problem(f"{name}: SGLang runs {kernel} for none of the copies, so the check says nothing about it")
