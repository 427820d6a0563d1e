"""Derives the rate of an emulated link. Communication then takes the same share of a layer's time as on GPUs.

    python -m sglang_shift.tools.benchmark.link_rate --model-path DIR --ranks 2 --target llama-70b

The share is rho: the time of a layer's two all-reduces over the time of its GEMMs, both in TP and for one token. For
the target, both times follow from published figures. Here the GEMMs are measured, and the rate is chosen so that rho is
the same. docs/emulated-link.md has the figures in a table, and says how certain they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Barrier

from sglang_shift.errors import ShiftError, print_error
from sglang_shift.models.decoder_layer import ELEMENT_BYTES, Layer, layer_of
from sglang_shift.tools.published import TARGETS

TOKENS = 1024
"""Number of tokens of the step whose GEMMs are measured."""

REPEATS = 15
START_SECONDS = 120.0


@dataclass(frozen=True)
class LinkRate:
    """The rate of a link, and how it was derived.

    Attributes:
        rate: Bits per second that each rank sends, and bits per second that it receives.
        rho: The rho of the target.
        gemm_flops: The measured FLOP/s of the slowest rank.
        text: The derivation, in several lines.
    """

    rate: float
    rho: float
    gemm_flops: float
    text: str


def read_layer(model_path: str | Path) -> tuple[Layer, str]:
    """Read the sizes of a layer and the dtype from a model's ``config.json``.

    Raises:
        ShiftError: there is no such file, or the model is not a dense decoder.
    """
    file = Path(model_path) / "config.json"
    try:
        return layer_of(json.loads(file.read_text()))
    except KeyError as error:
        raise ShiftError(f"{file} has no {error}; give the folder of a dense decoder as --model-path") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ShiftError(f"{file}: {error}; give the folder of a dense decoder as --model-path") from error


def rate_for(layer: Layer, ranks: int, element_bytes: int, flops: float, rho: float) -> float:
    """Return the bits per second at which the all-reduces take ``rho`` times as long as the GEMMs.

    Each rank computes ``flops`` FLOP/s.
    """
    gemm_seconds = 2 * layer.parameters / ranks / flops
    return 8 * layer.all_reduce_bytes(ranks, element_bytes) / (rho * gemm_seconds)


def most_gain(layer: Layer, ranks: int, rho: float) -> float:
    """Return the time of a layer's GEMMs and communication in TP over the time in SP, at the same rate."""
    share = layer.exchange_bytes(ranks, 1) / layer.all_reduce_bytes(ranks, 1)
    return (1 + rho) / (1 + rho * share)


def gemm_flops(shards: list[tuple[int, int]], dtype: str, ranks: int) -> float:
    """Run a layer's GEMMs in ``ranks`` processes of one thread at once. Return the FLOP/s of the slowest process."""
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(ranks, context) as pool:
        start = manager.Barrier(ranks)
        futures = [pool.submit(_layer_seconds, shards, dtype, start) for _ in range(ranks)]
        slowest = max(future.result() for future in futures)
    return 2 * TOKENS * sum(outputs * inputs for outputs, inputs in shards) / slowest


def _layer_seconds(shards: list[tuple[int, int]], dtype: str, start: Barrier) -> float:
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    products = [(torch.randn(TOKENS, k).to(kind), torch.randn(n, k).to(kind)) for n, k in shards]
    times = []
    for i in range(1 + REPEATS):
        if i == 1:  # the first is a warm-up
            start.wait(START_SECONDS)
        before = time.perf_counter()
        for x, weight in products:
            torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - before)
    return median(times[1:])


def choose_rate(model_path: str | Path, ranks: int, target: str, dtype: str | None = None) -> LinkRate:
    """Return the rate for a model on this machine. This takes some seconds on all its cores.

    Args:
        model_path: The folder of the model.
        ranks: Number of ranks.
        target: A name in :data:`TARGETS`.
        dtype: The servers' ``--dtype``. None, and a name that says no dtype, mean the one of the model's config.json.

    Raises:
        ShiftError: the target is unknown, or the rule does not fit the model or the number of ranks.
    """
    if target not in TARGETS:
        raise ShiftError(f"there is no target {target}; choose one of {', '.join(TARGETS)}")
    if ranks < 2:
        raise ShiftError(f"--ranks {ranks}: a rank alone has nothing to send; give 2 or more")
    goal = TARGETS[target]
    layer, own = read_layer(model_path)
    dtype = dtype if dtype in ELEMENT_BYTES else own
    size = ELEMENT_BYTES[dtype]
    flops = gemm_flops(list(layer.shards(ranks).values()), dtype, ranks)
    rho = goal.rho
    rate, slow, fast = (rate_for(layer, ranks, size, flops, r) for r in (rho.value, rho.high, rho.low))
    lines = [
        f"target      {goal.name}: {goal.layer.parameters / 1e6:.0f} M parameters a layer ({goal.layer_source})",
        f"GEMMs       {goal.gemm_flops.value / 1e12:.0f} TFLOP/s a GPU ({goal.gemm_flops.source})",
        f"all-reduce  {goal.bus_bandwidth.value / 1e9:.0f} GB/s ({goal.bus_bandwidth.source})",
        f"rho         {rho.value:.2f} ({rho.low:.2f} to {rho.high:.2f}): all-reduce time over GEMM time",
        f"here        {flops / 1e9:.1f} GFLOP/s in {dtype}, the slowest of {ranks} ranks of one thread (measured)",
        f"rate        {rate / 1e6:.0f} Mbit/s ({slow / 1e6:.0f} to {fast / 1e6:.0f})",
        f"sent        by a rank per token and layer: {layer.all_reduce_bytes(ranks, size):.0f} bytes in TP, "
        f"{layer.exchange_bytes(ranks, size):.0f} in SP",
        f"so          SP gains at most {most_gain(layer, ranks, rho.value):.2f} x on TP",
    ]
    return LinkRate(rate, rho.value, flops, "\n".join(lines))


def main(argv: list[str]) -> None:
    """Print the rate and its derivation."""
    parser = argparse.ArgumentParser(prog="python -m sglang_shift.tools.benchmark.link_rate")
    parser.add_argument("--model-path", required=True, help="folder of the benchmark's model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--target", default="llama-70b", choices=TARGETS)
    args = parser.parse_args(argv)
    try:
        print(choose_rate(args.model_path, args.ranks, args.target).text)
    except ShiftError as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main(sys.argv[1:])
