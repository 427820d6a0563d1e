"""SGLang's own choice of a bfloat16 GEMM kernel (``--bf16-gemm-backend``) on views of base weights.

Its backends are for some shapes and GPUs only. Some read a weight as if its rows were adjacent, or refuse it
otherwise; in TP the O and down projections give them views whose rows are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sglang_shift.tools.gpu_check.gemms import TOLERANCE, random_rows, random_weight
from sglang_shift.tools.gpu_check.record import Record, one_line
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, Matrix
from sglang_shift.tools.gpu_check.timing import error_of

BACKENDS = ("auto", "gemv", "cutedsl")
"""``auto`` is what a server has unless it is told otherwise."""

ROWS = (1, 2, 8, 16, 48, 64, 512)
"""Where SGLang's tables have kernels of their own, and where they have none."""


def check(record: Record) -> None:
    """Each backend that this GPU has, on each view of the deployments."""
    from sglang.srt.layers.quantization import unquant

    ran = []
    for name in BACKENDS:
        try:
            with backend(unquant, name):
                check_views(record, unquant._bf16_gemm_dispatch_impl, name, torch.device("cuda"))
            ran.append(name)
        except pytest.skip.Exception as reason:
            record.note(f"{name}: skipped: {reason}")
    record.note(f"checked: {', '.join(ran)}")


@contextmanager
def backend(unquant: ModuleType, name: str) -> Iterator[None]:
    """Inside, SGLang's module of unquantized layers is initialized as with ``--bf16-gemm-backend name``.

    Raises:
        pytest.skip.Exception: this GPU, or what is installed, does not have it.
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
    """The shards that are views of their base weights, each shape once."""
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
            except Exception as refusal:  # each kernel refuses in its own way, and each ends a step
                record.problem(f"{label}: {one_line(refusal)}")
                continue
            record.row(backend=name, n=view.outputs, k=view.inputs, stride=view.stride, m=rows, error=error)
            if not error <= TOLERANCE:
                record.problem(f"{label}: differs by {error:.2g} of its norm")
