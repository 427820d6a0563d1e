"""Compares the cost model with the table by which the paper Gyges motivates instances that merge and split.

The table (arXiv 2509.19729) is for Qwen2.5-32B on four GPUs of 96 GB. It has the longest context and the throughput of
three static layouts. We know it from summaries of the paper. They name neither the GPU nor the requests nor the engine,
so the throughput is compared as a ratio to four replicas, for two kinds of requests. Nothing in the model is fitted to
this table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_shift.models.decoder_layer import Layer
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.plan.hardware import Gpu, gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.search import Candidate, serve
from sglang_shift.tools.plan.step_time import StepTimes

MODEL = Model(
    "Qwen2.5-32B",
    Layer(hidden=5120, intermediate=27648, heads=40, kv_heads=8, head_dim=128),
    64,
    152_064,
    131_072,
    architecture="Qwen2ForCausalLM",
)
GPUS = 4
REQUESTS = 2000
"""Requests that all arrive at once."""
TRAFFIC = {"prompts of 3,500, 1 new token": (3500, 1), "prompts of 1,024, 256 new tokens": (1024, 256)}
"""Prompt and output tokens of each kind of requests. All of them fit the shortest context of the table."""


@dataclass(frozen=True)
class Published:
    """A row of the table.

    Attributes:
        layout: The layout in words.
        ranks: GPUs of a replica.
        context: Tokens of the longest context.
        throughput: Tokens per second of all GPUs.
    """

    layout: str
    ranks: int
    context: int
    throughput: float


PUBLISHED = (
    Published("4 x TP1", 1, 3_750, 1792),
    Published("2 x TP2", 2, 41_000, 1340),
    Published("TP4", 4, 120_000, 767),
)


@dataclass(frozen=True)
class Prediction:
    """What the cost model predicts for a row.

    Attributes:
        published: The row.
        context: Tokens that the KV cache of a replica holds.
        throughputs: Prompt and output tokens per second of all GPUs at the peak, for each kind of requests.
    """

    published: Published
    context: int
    throughputs: tuple[float, ...]


def gpu_of_96_gb() -> Gpu:
    """Return an H100 with 96 GB: the figures of an H100, and memory in proportion to its 80 GB."""
    h100 = gpus()["H100"]
    return replace(h100, name="H100 with 96 GB", memory_mib=h100.memory_mib * 96 // 80)


def predict() -> list[Prediction]:
    """Predict all rows."""
    gpu = gpu_of_96_gb()
    rows = []
    for row in PUBLISHED:
        candidate = Candidate(RankLayout(row.ranks, 1), GPUS // row.ranks)
        costs = StepTimes(MODEL, gpu, candidate.layout).cost_model()
        tokens = memory(MODEL, gpu, candidate.layout, candidate.chunk).tokens
        peaks = [serve([Request(0.0, *lengths)] * REQUESTS, candidate, costs, tokens) for lengths in TRAFFIC.values()]
        rows.append(Prediction(row, tokens, tuple(peak.throughput for peak in peaks)))
    return rows


def memory_by_the_contexts() -> tuple[float, float]:
    """Return what the published contexts of one and of four GPUs say, if all memory beside the weights is for tokens.

    k GPUs that have m bytes each, and weights of w bytes together, hold ``(k m - w) / b`` tokens of b bytes.

    Returns:
        m and b.
    """
    weights = MODEL.sizes.weight_bytes(1, 1, 2)
    one, _, four = (row.context for row in PUBLISHED)
    usable = weights * (four - one) / (four - GPUS * one)
    return usable, (usable - weights) / one


def report() -> str:
    """Return the comparison as Markdown: a table, and a sentence about the published contexts."""
    rows = predict()
    first = rows[0]
    names = "".join(f" | {name}" for name in TRAFFIC)
    lines = [
        f"| Layout | Context, predicted | Published | Tokens/s of 4 x TP1, published{names} |",
        "|---|--:|--:|--:" + "|--:" * len(TRAFFIC) + "|",
    ]
    for row in rows:
        published = row.published.throughput / first.published.throughput
        ratios = [own / theirs for own, theirs in zip(row.throughputs, first.throughputs, strict=True)]
        cells = "".join(f" | {ratio:.2f} ({ratio / published - 1:+.0%})" for ratio in ratios)
        contexts = f"{row.context:,} | {row.published.context:,}"
        lines.append(f"| {row.published.layout} | {contexts} | {published:.2f}{cells} |")
    usable, token = memory_by_the_contexts()
    between = (2 * usable - MODEL.sizes.weight_bytes(1, 1, 2)) / token
    kv = MODEL.sizes.kv_bytes_per_token(1, 2)
    sentence = (
        f"The published contexts of TP1 and TP4 follow from {usable / 1e9:.1f} GB of usable memory for each GPU and "
        f"{token / 1e6:.2f} MB for each token. This gives {between:,.0f} tokens for TP2. K and V of a token take "
        f"{kv / 1e6:.2f} MB."
    )
    return "\n".join(lines) + f"\n\n{sentence}"
