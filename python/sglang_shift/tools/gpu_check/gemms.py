"""Times the GEMMs of one rank in both modes, and checks whether a TP shard may be a view of its base weight.

The full-TP shards of O and down are slices of columns of the base weights, so their rows are not adjacent. Each shard
is timed as such a view and as a contiguous copy. A copy would need memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, Deployment, Matrix
from sglang_shift.tools.gpu_check.timing import error_of, seconds_of
from sglang_shift.tools.tables import text_table

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
"""Numbers of tokens of a step. A rank has one row for each token in TP, and 1/S of these rows in SP."""

FP8 = torch.float8_e4m3fn
MAX_RATIO, MAX_EXTRA_SECONDS = 1.05, 1e-6
"""A view is free if it takes at most MAX_RATIO times as long as a copy, or at most MAX_EXTRA_SECONDS longer.

Such a small difference may be noise of the measurement.
"""

TOLERANCE = 0.02
"""The largest error of a product in bfloat16, relative to the norm. Two kernels may sum in different orders."""


@dataclass(frozen=True)
class Cost:
    """The time of a GEMM with a view and with a contiguous copy, in seconds, at one number of tokens."""

    model: str
    projection: str
    tokens: int
    view: float
    copy: float

    @property
    def ratio(self) -> float:
        """The time with the view over the time with the copy."""
        return self.view / self.copy

    @property
    def is_free(self) -> bool:
        """Whether a copy would gain nothing."""
        return self.ratio <= MAX_RATIO or self.view - self.copy <= MAX_EXTRA_SECONDS


def check(record: Record) -> None:
    """Time every matrix of every deployment in bfloat16, and in fp8 if ``torch._scaled_mm`` accepts it."""
    device = torch.device("cuda")
    for dtype in (torch.bfloat16, FP8):
        if dtype is FP8 and torch.cuda.get_device_capability(device) < (8, 9):
            record.note("fp8: skipped: this GPU multiplies no fp8 numbers")
            continue
        costs = [cost for deployment in DEPLOYMENTS for cost in measure(record, deployment, dtype, device)]
        for text in verdict(costs, name_of(dtype)):
            record.note(text)
    record.note("weights are views, whatever this says: there is one copy of them")


def measure(
    record: Record, deployment: Deployment, dtype: torch.dtype, device: torch.device, steps: tuple[int, ...] = TOKENS
) -> Iterator[Cost]:
    """Time the GEMMs of a rank in both modes, and yield the cost of each view."""
    for projection, shard in deployment.shards.items():
        base = random_weight(deployment.bases[projection], dtype, device)
        view = base[: shard.outputs, : shard.inputs]  # a view for another SP index takes as long
        copy = view.contiguous()
        for tokens in steps:
            labels = {
                "deployment": deployment.name,
                "projection": projection,
                "dtype": name_of(dtype),
                "tokens": tokens,
            }
            rows = random_rows(tokens, shard.inputs, dtype, device)
            contiguous = _time(record, {**labels, "held": "shard"}, rows, copy)
            if shard.is_view:
                seconds = _time(record, {**labels, "held": "view"}, rows, view)
                if contiguous is not None and seconds is not None:
                    _check_view(record, labels, rows, view, copy)
                    yield Cost(deployment.name, projection, tokens, seconds, contiguous)
            local = padded_local_tokens(tokens, deployment.sp)
            rows = random_rows(local, base.shape[1], dtype, device)
            _time(record, {**labels, "held": "base"}, rows, base)


def _time(record: Record, labels: dict[str, object], x: torch.Tensor, weight: torch.Tensor) -> float | None:
    """Return the seconds of one product, or None if the kernel refuses it."""
    try:
        seconds = seconds_of(lambda: product(x, weight), x.device)
    except (RuntimeError, ValueError) as error:
        record.row(**labels, refused=" ".join(str(error).split())[:200])
        return None
    matrix, rows = Matrix(weight.shape[0], weight.shape[1], weight.stride(0)), x.shape[0]
    record.row(
        **labels,
        n=matrix.outputs,
        k=matrix.inputs,
        stride=matrix.stride,
        m=rows,
        us=round(1e6 * seconds, 2),
        tflops=round(matrix.flops(rows) / seconds / 1e12, 2),
        gb_per_s=round(matrix.traffic(rows, weight.element_size()) / seconds / 1e9, 1),
    )
    return seconds


def _check_view(
    record: Record, labels: dict[str, object], x: torch.Tensor, view: torch.Tensor, copy: torch.Tensor
) -> None:
    if not (error := error_of(product(x, view), product(x, copy))) <= TOLERANCE:
        record.problem(f"{labels}: the view's product differs by {error:.2g} of its norm from the copy's")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T``. An fp8 product is bfloat16, and one scale of 1 is for all elements."""
    if weight.dtype is not FP8:
        return F.linear(x, weight)
    scale = unit_scale(x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)


@cache
def unit_scale(device: torch.device) -> torch.Tensor:
    """Return the scale 1 as a tensor."""
    return torch.ones((), dtype=torch.float32, device=device)


def random_weight(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a random weight ``[outputs, inputs]``. Its products with random rows are about 1."""
    return (torch.randn(matrix.outputs, matrix.inputs, device=device) * matrix.inputs**-0.5).to(dtype)


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random rows ``[rows, width]``."""
    return torch.randn(rows, width, device=device).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in the figures."""
    return "fp8" if dtype is FP8 else str(dtype).removeprefix("torch.")


def verdict(costs: list[Cost], dtype: str) -> list[str]:
    """Say for how many cases a view is free, and in which case a copy would pay most.

    If there are any views, a table has the time with a view over the time with a copy.
    """
    if not costs:
        return [f"{dtype}: no view was taken: every such shard would need a contiguous copy"]
    slower = [cost for cost in costs if not cost.is_free]
    allowed = f"up to {MAX_RATIO:g} x a copy's time, or {1e6 * MAX_EXTRA_SECONDS:g} us more"
    text = f"{dtype}: a view is free ({allowed}) in {len(costs) - len(slower)} of {len(costs)} cases"
    if slower:
        worst = max(slower, key=lambda cost: cost.ratio)
        where = f"{worst.model}, {worst.projection}, {worst.tokens} tokens"
        text += f"; dearest: {where}: {worst.ratio:.2f} x, which argues for a copy there"
    steps = sorted({cost.tokens for cost in costs})
    ratios = {(cost.model, cost.projection, cost.tokens): cost.ratio for cost in costs}
    rows: list[list[object]] = [[f"{dtype}: view / copy, by tokens", *steps]]
    for model, projection in dict.fromkeys((cost.model, cost.projection) for cost in costs):
        cells = [ratios.get((model, projection, tokens)) for tokens in steps]
        rows.append([f"{model}: {projection}", *("refused" if ratio is None else f"{ratio:.2f}" for ratio in cells)])
    return [text, text_table(rows)]
