#!/usr/bin/env python3
"""Say how much sparse prefills could skip by bounds of a block's mass, without its scores, on SmolLM2-135M-Instruct.

    ./scripts/chat_model.sh                        # once: installs the weights
    python benchmark/block_bounds.py

The text is the beginning of docs/usage.md. For the last chunk of 512 tokens and seven of the layers, each head and each
64 tokens leave out as many blocks of the prefix as possible, so that no query surely leaves out more than EPS. The rows
are what is known of a block:

- its exact mass, as in the server;
- the smallest and the largest value of each channel, of all its keys or of each 16 of them;
- the keys in their 32 main directions, and the length of the rest: half of the products of exact scores.

"Too large by" is the mean of how far the logarithm of a bound is above that of the mass, in nats.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "test/support"))

LAYERS = (0, 4, 9, 14, 19, 24, 29)
CHUNK, BLOCK, LOCAL, DIRECTIONS = 512, 64, 2, 32
SHARES = (0.01, 0.05, 0.1)
Bound: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Gets queries, ``[queries, width]``, and keys, ``[blocks, BLOCK, width]``. Returns the logarithm of a number that is
no smaller than the sum of the exponentials of a block's scores, ``[queries, blocks]``."""


def exact(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qd,nkd->qnk", query, key).logsumexp(-1)


def by_channel(keys: int) -> Bound:
    """The bound from the range of each channel over a number of keys."""

    def bound(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        parts = key.unflatten(1, (-1, keys))
        high = torch.einsum("qd,npd->qnp", query.clamp(min=0), parts.amax(2))
        low = torch.einsum("qd,npd->qnp", query.clamp(max=0), parts.amin(2))
        return (high + low).logsumexp(-1) + math.log(keys)

    return bound


def by_direction(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The bound from the main directions of all keys, and the length of what is orthogonal to them."""
    flat = key.flatten(0, 1)
    mean = flat.mean(0)
    directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:DIRECTIONS]
    main = (key - mean) @ directions.T
    rest = (key - mean - main @ directions).norm(dim=-1)
    query_main = query @ directions.T
    scores = torch.einsum("qd,nkd->qnk", query_main, main) + (query @ mean)[:, None, None]
    return (scores + (query - query_main @ directions).norm(dim=-1)[:, None, None] * rest).logsumexp(-1)


BOUNDS: dict[str, Bound] = {
    "exact": exact,
    "channels, 64 keys": by_channel(64),
    "channels, 16 keys": by_channel(16),
    f"{DIRECTIONS} directions": by_direction,
}


class Attention:
    """Exact attention for transformers' classes. It keeps queries and keys of some layers."""

    def __init__(self) -> None:
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        from sglang_shift.platforms.attention import attend

        if module.layer_idx in LAYERS:
            self.kept.append((q[0, :, -CHUNK:] * scaling, k[0]))
        part = attend(*(x[0].transpose(0, 1) for x in (q, k, v)), scale=scaling)
        return part.output.unsqueeze(0), None


def cases(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each head and each 64 tokens: queries, blocks of keys to choose from, and what is surely computed.

    The last is the logarithm of the sum of the exponentials of its scores.
    """
    prefix = key.shape[1] - CHUNK
    last = prefix - LOCAL * BLOCK
    for head, rows in enumerate(query):
        keys = key[head * key.shape[0] // query.shape[0]]
        always = torch.cat([keys[:BLOCK], keys[last:]])
        for start in range(0, CHUNK, BLOCK):
            own = rows[start : start + BLOCK]
            later = torch.arange(always.shape[0]) > BLOCK * (1 + LOCAL) + start + torch.arange(BLOCK)[:, None]
            sure = (own @ always.T).masked_fill(later, -math.inf).logsumexp(-1)
            yield own, keys[BLOCK:last].unflatten(0, (-1, BLOCK)), sure


def skipped(bound: torch.Tensor, rest: torch.Tensor, share: float) -> float:
    """The share of the blocks that can be left out, the lightest first.

    Args:
        bound: Logarithms, ``[queries, blocks]``.
        rest: What is surely not left out, as a logarithm, ``[queries]``. If at most D is left out and at least S is
            not, a query drops at most ``D / (D + S)``.
        share: EPS.
    """
    ratios = (bound - rest[:, None]).exp()
    dropped = ratios[:, ratios.amax(0).argsort()].cumsum(1).amax(0)
    return float((dropped <= share / (1 - share)).double().mean())


def skipped_exactly(mass: torch.Tensor, sure: torch.Tensor, share: float) -> float:
    """The same for exact masses: the whole sum is known."""
    whole = torch.logaddexp(mass.logsumexp(-1), sure)
    return skipped(mass, whole + math.log(1 - share), share)


@torch.no_grad()
def main() -> None:
    """Print a table."""
    import smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=3072, help=f"tokens of the text, a multiple of {BLOCK}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attention = Attention()
    model, tokenizer = smollm2.load(attention)
    ids = tokenizer.encode((ROOT / "docs/usage.md").read_text())[: options.length]
    model.model(torch.tensor([ids]))
    found = [case for query, key in attention.kept for case in cases(query, key)]
    truths = [exact(query, blocks) for query, blocks, _ in found]
    print("| What is known of a block | Too large by |", *(f"Skipped at EPS = {share:g} |" for share in SHARES))
    print("|---|--:|--:|--:|--:|")
    for name, bound in BOUNDS.items():
        bounds = [bound(query, blocks) for query, blocks, _ in found]
        gap = sum(float((a - b).mean()) for a, b in zip(bounds, truths, strict=True)) / len(found)
        count = skipped_exactly if bound is exact else skipped
        shares = [
            sum(count(b, sure, share) for b, (_, _, sure) in zip(bounds, found, strict=True)) / len(found)
            for share in SHARES
        ]
        print(f"| {name} | {gap:.1f} |", *(f"{100 * share:.1f} % |" for share in shares), flush=True)


if __name__ == "__main__":
    main()
