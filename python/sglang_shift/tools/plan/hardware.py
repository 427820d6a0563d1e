"""Describes GPUs by published figures: how long a kernel or a collective of a given size takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import hypot
from typing import Any

from sglang_shift.cost.model import Curve, isotonic
from sglang_shift.errors import ShiftError
from sglang_shift.models.formats import Format

NODE = 8
"""Number of GPUs of the largest group for which there are figures."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that takes a fixed time, and a time in proportion to its work.

    Attributes:
        latency: Seconds without any work.
        rate: Bytes or FLOPs per second.
    """

    latency: float
    rate: float

    def seconds(self, work: float) -> float:
        """Return the seconds for ``work`` bytes or FLOPs."""
        return self.latency + work / self.rate


@dataclass(frozen=True)
class Gemm:
    """Matrix products of one dtype: a roofline whose corner is rounded.

    The time is ``latency + sqrt((bytes / bandwidth)**2 + (FLOPs / flops)**2)``. Few rows wait for the weights to be
    read, and many rows wait for the arithmetic. Numbers of rows in between wait for both.

    Attributes:
        latency: Seconds without any work.
        bandwidth: Bytes per second.
        flops: FLOP/s.
        weight_bytes: Bytes of an element of the weight.
        input_bytes: Bytes of an element of the input; None if it has as many as the weight's.
    """

    latency: float
    bandwidth: float
    flops: float
    weight_bytes: float
    input_bytes: float | None = None

    def seconds(self, rows: int, outputs: int, inputs: int) -> float:
        """Return the seconds of ``[rows, inputs]`` times a weight ``[outputs, inputs]``. Outputs have 2 bytes each."""
        return self.grouped_seconds(rows, outputs, inputs, 1)

    def grouped_seconds(self, rows: float, outputs: int, inputs: int, weights: float) -> float:
        """Return the seconds of a kernel that multiplies ``rows`` rows, each by one of several weights that it reads.

        Args:
            rows: Rows of all products together.
            outputs: Rows of each weight.
            inputs: Columns of each weight.
            weights: Number of weights.
        """
        of_input = self.weight_bytes if self.input_bytes is None else self.input_bytes
        traffic = (rows * of_input + weights * outputs * self.weight_bytes) * inputs + 2 * rows * outputs
        return self.latency + hypot(traffic / self.bandwidth, 2 * rows * outputs * inputs / self.flops)


@dataclass(frozen=True)
class Gpu:
    """A GPU in a node of its kind.

    Attributes:
        name: The name in ``--gpus``.
        memory_mib: The memory in MiB.
        hbm: Nominal bytes per second of its memory. Nothing is computed from it.
        gemms: Matrix products of ``bfloat16``, ``fp8`` (a scale per channel and token) and ``fp8_block`` (a scale per
            128 x 128).
        prefill_attention: The attention of a prefill. Its work is the FLOPs of the causal half only.
        decode_attention: The attention of a decode, for a KV cache of ``bfloat16`` or ``fp8``. Its work is the bytes of
            the KV cache that it reads.
        elementwise: Any kernel that reads and writes each element once. Its work is these bytes.
        all_reduces: Seconds by bytes of the message, for each number of ranks.
        all_to_alls: Seconds by bytes of a rank's buffer, for each number of ranks.
    """

    name: str
    memory_mib: int
    hbm: float
    gemms: dict[str, Gemm]
    prefill_attention: Kernel
    decode_attention: dict[str, Kernel]
    elementwise: Kernel
    all_reduces: dict[int, Curve]
    all_to_alls: dict[int, Curve]

    def gemm(self, weights: Format) -> Gemm:
        """Return the matrix products of a format. Without figures of the format, the arithmetic is that of bfloat16."""
        if weights.name in self.gemms:
            return self.gemms[weights.name]
        input_bytes = 1 if weights.quantizes_inputs else 2
        return replace(self.gemms["bfloat16"], weight_bytes=float(weights.bits / 8), input_bytes=input_bytes)

    def all_reduce(self, ranks: int, size: float) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes. One rank takes no time."""
        return self.all_reduces[ranks](round(size)) if ranks > 1 else 0.0

    def all_to_all(self, ranks: int, size: float) -> float:
        """Return the seconds of an all-to-all of ``size`` bytes on each rank, with the rank's own block.

        One rank takes no time. A rank sends ``(ranks - 1) / ranks`` of the bytes, and receives the same number of
        bytes. In an all-gather to ``size`` bytes on each rank, a rank receives the same number of bytes. So an
        all-gather counts as an all-to-all.
        """
        return self.all_to_alls[ranks](round(size)) if ranks > 1 else 0.0


@cache
def gpus() -> dict[str, Gpu]:
    """Return all GPUs for which there are figures, by name."""
    content = json.loads(files("sglang_shift.tools.plan").joinpath("figures.json").read_text())
    sizes = tuple(content["collective_bytes"])
    return {name: _gpu(name, raw, sizes) for name, raw in content["gpus"].items()}


def _gpu(name: str, raw: dict[str, Any], sizes: tuple[int, ...]) -> Gpu:
    def kernel(of: dict[str, float]) -> Kernel:
        return Kernel(1e-6 * of["latency_us"], of["per_s"])

    def collectives(of: dict[str, list[float]]) -> dict[int, Curve]:
        # In measurements, a small message does not always take longer than a smaller message.
        return {int(ranks): Curve(sizes, tuple(isotonic(1e-6 * us for us in times))) for ranks, times in of.items()}

    gemms = {
        dtype: Gemm(1e-6 * of["latency_us"], of["bytes_per_s"], of["flops"], 2 if dtype == "bfloat16" else 1)
        for dtype, of in raw["gemm"].items()
    }
    decode = {dtype: kernel(of) for dtype, of in raw["decode_attention"].items()}
    return Gpu(
        name, raw["memory_mib"], raw["hbm_bytes_per_s"], gemms, kernel(raw["prefill_attention"]), decode,
        kernel(raw["elementwise"]), collectives(raw["all_reduce_us"]), collectives(raw["all_to_all_us"]),
    )  # fmt: skip


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Return the number of GPUs and their kind, from a text such as ``8xH200``.

    Raises:
        ShiftError: the text is something else, or there are no figures for these GPUs.
    """
    match = re.fullmatch(r"(\d{1,4})\s*[xX]\s*(\S+)", text.strip())
    kinds = " or ".join(gpus())
    if match is None:
        raise ShiftError(f"--gpus '{text}' is not a number of GPUs and their kind; give for example {NODE}xH200")
    count, name = int(match[1]), match[2].upper()
    if name not in gpus():
        raise ShiftError(f"--gpus {text}: there are no figures for a {match[2]}; give {kinds}")
    if not 1 <= count <= NODE:
        raise ShiftError(f"--gpus {text}: there are figures for the links inside a node only; give 1 to {NODE} GPUs")
    return count, gpus()[name]
