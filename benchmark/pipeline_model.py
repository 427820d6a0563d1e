#!/usr/bin/env python3
"""What the pipelined exchange would gain on GPUs, by the cost model of 8 x H200 (docs/cost-model.md).

    python benchmark/pipeline_model.py

The model has one link and one pool of SMs: messages and attention overlap, and neither slows the other down. For links
other than NVLink there are no figures. Their collectives are assumed to take 20 us and the bytes over the bandwidth.
"""

from __future__ import annotations

from dataclasses import replace

from sglang_shift.cost.model import Curve
from sglang_shift.modes import Mode
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.tools.plan.blocks import ELEMENT, HeadAttention
from sglang_shift.tools.plan.hardware import Gpu, gpus
from sglang_shift.tools.plan.paper import MODELS
from sglang_shift.tools.plan.step_time import StepTimes

RANKS, LATENCY, MOST = 8, 20e-6, 1 << 40
SHAPES = ((2048, 0), (8192, 0), (8192, 32768))
GROUPS = (2, 4)


def linked(gpu: Gpu, bandwidth: float, slower: float) -> Gpu:
    """Return a GPU with another link, and with arithmetic and memory that are slower by a factor."""

    def curve(passes: float) -> Curve:
        return Curve((1, MOST), tuple(LATENCY + passes * (RANKS - 1) / RANKS * size / bandwidth for size in (1, MOST)))

    return replace(
        gpu,
        gemms={
            name: replace(gemm, bandwidth=gemm.bandwidth / slower, flops=gemm.flops / slower)
            for name, gemm in gpu.gemms.items()
        },
        prefill_attention=replace(gpu.prefill_attention, rate=gpu.prefill_attention.rate / slower),
        elementwise=replace(gpu.elementwise, rate=gpu.elementwise.rate / slower),
        all_reduces={RANKS: curve(2)},
        all_to_alls={RANKS: curve(1)},
    )


def layer_seconds(times: StepTimes, tokens: int, prefix: int, groups: int) -> float:
    """Return the seconds of a layer's exchanges and attention, with so many groups of heads."""
    block, gpu, rows = times.block, times.gpu, -(-tokens // RANKS)
    assert isinstance(block, HeadAttention)

    def exchange(columns: float) -> float:
        return gpu.all_to_all(RANKS, rows * RANKS * columns * ELEMENT)

    pairs = tokens * prefix + tokens * (tokens + 1) // 2
    latency = gpu.prefill_attention.latency
    attention = latency + block.seconds_per_pair("prefill", gpu, "bfloat16") * pairs / groups
    link = compute = 0.0
    ready = []
    for group in range(groups):  # the link brings all groups first
        link += exchange(block.queries / groups + (2 * block.values if group == 0 else 0))
        compute = max(compute, link) + attention
        ready.append(compute)
    for each in ready:  # and then takes the outputs back, as they are ready
        link = max(link, each) + exchange(block.queries / groups)
    return link


def main() -> None:
    h200 = gpus()["H200"]
    links = {
        "NVLink": h200,
        "PCIe, 22 GB/s, a quarter of the FLOPs": linked(h200, 22e9, 4),
        "two nodes, 50 GB/s": linked(h200, 50e9, 1),
    }
    print("| Link | Model | Tokens | Prefix | SP step, ms | " + " | ".join(f"{n} groups" for n in GROUPS) + " |")
    print("|---" * (5 + len(GROUPS)) + "|")
    for link, gpu in links.items():
        for name, model in MODELS.items():
            times = StepTimes(model, gpu, RankLayout(RANKS, RANKS))
            for tokens, prefix in SHAPES:
                pairs = tokens * prefix + tokens * (tokens + 1) // 2
                step = times.seconds(Mode.SP, "prefill", tokens) + times.attention("prefill") * pairs
                ordinary = layer_seconds(times, tokens, prefix, 1)
                gains = [model.layers * (ordinary - layer_seconds(times, tokens, prefix, n)) / step for n in GROUPS]
                cells = " | ".join(f"{100 * gain:+.1f} %" for gain in gains)
                print(f"| {link} | {name} | {tokens} | {prefix} | {1e3 * step:.0f} | {cells} |")


if __name__ == "__main__":
    main()
