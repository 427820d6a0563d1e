#!/usr/bin/env python3
"""Compute how much memory a merge with --merge-weights free gives to the KV cache, for some models. Nothing is run.

python benchmark/freed_weights.py
python benchmark/freed_weights.py --page-mib 16
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.families import Role
from sglang_shift.weights.ffn_pages import pages_of
from sglang_shift.weights.level_weights import Blocks

GIB, MIB = 1 << 30, 1 << 20
ELEMENT = 2  # bytes: weights and KV cache in bfloat16


@dataclass(frozen=True)
class Case:
    """A model on some ranks, which merge into one instance."""

    name: str
    ranks: int
    layers: int
    layer: Layer


CASES = (
    Case("Llama-3-8B", 4, 32, Layer(4096, 14_336, 32, 8, 128)),
    Case("Qwen3-14B", 8, 40, Layer(5120, 17_408, 40, 8, 128)),
    Case("Qwen2.5-32B", 4, 64, Layer(5120, 27_648, 40, 8, 128)),
    Case("Llama-3-70B", 8, 80, Layer(8192, 28_672, 64, 8, 128)),
)


def row(case: Case, page: int) -> str:
    """One row of the table."""
    shards = case.layer.shards(case.ranks)
    blocks = [ELEMENT * outputs * inputs for outputs, inputs in (shards[Role.GATE_UP], shards[Role.DOWN])]
    ranks = case.ranks
    total = case.layers * ranks * sum(blocks)
    freed = (
        page
        * case.layers
        * min(
            sum(-(-ranks * block // page) - len(pages_of(Blocks(ranks, rank, 1), block, page)) for block in blocks)
            for rank in range(ranks)
        )
    )
    ideal = total - total // ranks
    padding = case.layers * ranks * sum(-(-block // page) * page - block for block in blocks)
    token = 2 * ELEMENT * case.layers * case.layer.kv_heads // ranks * case.layer.head_dim
    part = f"{freed / GIB:.2f} ({100 * freed / ideal:.1f} %)"
    return (
        f"| {case.name} | {ranks} | {total / GIB:.1f} | {ideal / GIB:.2f} | {part} | {freed // token:,} | "
        f"{padding / GIB:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-mib", type=int, default=2, help="the size of a page in MiB")
    page = parser.parse_args().page_mib * MIB
    print("| Model | Ranks | FFNs, GiB | Others' shards, GiB | Freed, GiB | Tokens gained | Padding would take, GiB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for case in CASES:
        print(row(case, page))


if __name__ == "__main__":
    main()
