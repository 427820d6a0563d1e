#!/usr/bin/env python3
"""Print the table of docs/quantization.md: how far SP is from TP in each format of weights.

python test/support/quantized_table.py
"""

from __future__ import annotations

from multiprocessing import get_context
from typing import Any

from harness import run_ranks
from quantized_layers import EXPERT_FORMATS
from sglang_shift.tools.gpu_check.formats import FORMATS
from stacked_checks import Figures, experts_figure, figures


def collect(rank: int, world: int, sp: int, name: str, queue: Any) -> None:
    queue.put(figures(rank, world, sp, FORMATS[name]))


def collect_experts(rank: int, world: int, sp: int, name: str, queue: Any) -> None:
    queue.put(experts_figure(rank, world, sp, EXPERT_FORMATS[name]))


def of_all_ranks(world: int, function: Any, name: str) -> list[Any]:
    queue = get_context("fork").Queue()
    run_ranks(world, function, 2, name, queue)
    return [queue.get() for _ in range(world)]


def row(name: str) -> str:
    two, four = (of_all_ranks(world, collect, name) for world in (2, 4))
    linears: list[Figures] = [found for ranks in (two, four) for each in ranks for found in each.values()]
    largest = max(found.difference for found in linears)
    whole = max(found.of_bound for each in four for found in each.values())
    error = max(found.error for found in linears)
    return f"| {name} | {two[0]['qkv'].text} | {largest:g} | {whole:.2f} | {error:.4f} |"


def main() -> None:
    print("| Format | Columns | Largest difference | Whole sum, P = 4 | Distance of TP |\n|---|---|---|---|---|")
    for name in FORMATS:
        print(row(name), flush=True)
    print("\n| Experts on every rank | Largest difference |\n|---|---|")
    for name in EXPERT_FORMATS:
        found = [figure for world in (2, 4) for figure in of_all_ranks(world, collect_experts, name)]
        print(f"| {name} | {max(found):.1e} |" if max(found) else f"| {name} | 0 |", flush=True)


if __name__ == "__main__":
    main()
