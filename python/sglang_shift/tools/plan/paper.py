"""Compares the cost model with the Shift Parallelism paper's table. Nothing in the model is fitted to this table.

The table (arXiv 2509.16495) is for 8 x H200, FP8, prompts of 4k tokens and outputs of 250 tokens. Its engine is vLLM
0.10.1. Its models are RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic and Qwen/Qwen3-32B-FP8:
https://github.com/snowflakedb/ArcticInference/blob/main/benchmark/reproducibility/server.sh
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from sglang_shift.parallel.layout import RankLayout
from sglang_shift.simulate.traffic import Request
from sglang_shift.tools.plan.hardware import NODE, gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.search import Candidate, serve
from sglang_shift.tools.plan.step_time import Engine, StepTimes
from sglang_shift.tools.published import TARGETS

PROMPT, OUTPUT = 4096, 250
PEAK_REQUESTS = 2000
"""Number of requests that come at once, to measure the peak."""

GOAL = 0.15

MODELS = {
    "Llama-70B": Model("Llama-3.3-70B", TARGETS["llama-70b"].layer, 80, 128_256, 131_072, "fp8"),
    "Qwen-32B": Model(
        "Qwen3-32B", TARGETS["qwen-32b"].layer, 64, 151_936, 40_960, "fp8_block", architecture="Qwen3ForCausalLM"
    ),
}
KV_DTYPES = {"Llama-70B": "bfloat16", "Qwen-32B": "fp8"}

CONFIGURATIONS = {
    "DP": Candidate(RankLayout(1, 1), NODE),
    "TP": Candidate(RankLayout(NODE, 1), 1),
    "SP": Candidate(RankLayout(NODE, NODE), 1, policy="sp"),
    "Shift": Candidate(RankLayout(NODE, NODE), 1, policy="calibrated"),
}
METRICS = ("TTFT, ms", "TPOT, ms", "tokens/s")

PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "Llama-70B": {
        "DP": (614, 22.5, 45_900),
        "TP": (159, 9.34, 24_700),
        "SP": (103, 32.5, 37_200),
        "Shift": (102, 10.1, 37_400),
    },
    "Qwen-32B": {
        "DP": (385, 18.8, 70_100),
        "TP": (113, 8.68, 38_300),
        "SP": (79.8, 24.4, 52_300),
        "Shift": (86.4, 9.48, 53_800),
    },
}

VLLM_STEP, VLLM_REQUEST = 0.0012, 0.0182
"""Seconds that vLLM V1 adds to the GPU's time, per step and before a request's first token: docs/cost-model.md."""

CUTLASS_BLOCK = {1: 1.25, 512: 1.41}
"""Time of block-wise FP8 products in vLLM 0.10.1 over their time in DeepGEMM, by the least number of rows.

The figures are DeepGEMM's: docs/cost-model.md.
"""


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        model: The name of the model.
        configuration: ``DP``, ``TP``, ``SP`` or ``Shift``.
        metric: One of :data:`METRICS`.
        predicted: The value of the cost model.
        published: The value of the paper.
    """

    model: str
    configuration: str
    metric: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """The error of the prediction, relative to the published value."""
        return self.predicted / self.published - 1


def engine_of(model: Model) -> Engine:
    """Return the paper's engine for a model."""
    factor = CUTLASS_BLOCK if model.weights == "fp8_block" else {1: 1.0}
    return Engine(VLLM_STEP, VLLM_REQUEST, factor)


def predict(name: str, configuration: str, engine: Engine) -> tuple[float, float, float]:
    """Predict TTFT and TPOT of a single request, in ms, and the tokens per second of many requests at once."""
    model, candidate, gpu = MODELS[name], CONFIGURATIONS[configuration], gpus()["H200"]
    kv_dtype = KV_DTYPES[name]
    costs = StepTimes(model, gpu, candidate.layout, kv_dtype, engine).cost_model()
    pool = memory(model, gpu, candidate.layout, candidate.chunk, kv_dtype, shifts=candidate.shifts).tokens
    alone = serve([Request(0.0, PROMPT, OUTPUT)], candidate, costs, pool).served[0]
    peak = serve([Request(0.0, PROMPT, OUTPUT)] * PEAK_REQUESTS, candidate, costs, pool)
    return 1e3 * (alone.ttft + engine.request), 1e3 * (alone.tpot or 0.0), peak.throughput


def check(engine: Callable[[Model], Engine] = engine_of) -> list[Cell]:
    """Predict every cell of the table, with the figures of each model's engine."""
    return [
        Cell(name, configuration, *numbers)
        for name, rows in PUBLISHED.items()
        for configuration, published in rows.items()
        for numbers in zip(METRICS, predict(name, configuration, engine(MODELS[name])), published, strict=True)
    ]


def ratio_errors(cells: list[Cell]) -> list[float]:
    """Return the errors of the ratio between two configurations of a model, for each pair.

    The ratio is between the end-to-end times of a single request. Plans are ranked by such ratios. A factor that slows
    down all configurations alike does not change them.
    """
    by = {(c.model, c.configuration, c.metric): c for c in cells}
    errors = []
    for model in dict.fromkeys(c.model for c in cells):
        end_to_end = []
        for name in PUBLISHED[model]:
            ttft, tpot = (by[model, name, metric] for metric in METRICS[:2])
            more = OUTPUT - 1
            end_to_end.append((ttft.predicted + more * tpot.predicted) / (ttft.published + more * tpot.published))
        errors += [max(a / b, b / a) - 1 for a, b in combinations(end_to_end, 2)]
    return errors


def table(cells: list[Cell]) -> str:
    """Return the cells as a Markdown table."""
    lines = ["| Model | | Metric | Predicted | Published | Error |", "|---|---|---|--:|--:|--:|"]
    for c in cells:
        numbers = [f"{n:,.0f}" if n >= 1000 else f"{n:.3g}" for n in (c.predicted, c.published)]
        lines.append(f"| {c.model} | {c.configuration} | {c.metric} | {numbers[0]} | {numbers[1]} | {c.error:+.0%} |")
    return "\n".join(lines)


WITHOUT_ENGINE = (
    "These predictions use three figures of the paper's engine (see below), which plans do not use. The next figures "
    "are without them."
)


def summary(cells: list[Cell]) -> str:
    """Say how many cells meet the goal, and how far off the cells and their ratios are."""
    errors, ratios = [abs(c.error) for c in cells], ratio_errors(cells)
    near = sum(error <= GOAL for error in errors)
    return (
        f"{near} of {len(cells)} cells are within {GOAL:.0%}. The error is {fmean(errors):.1%} on average and "
        f"{max(errors):.0%} at worst. If two configurations are compared by their end-to-end times, the error is "
        f"{fmean(ratios):.1%} on average and {max(ratios):.0%} at worst."
    )


def report() -> str:
    """Return the check as Markdown, with the figures of the paper's engine.

    The last line is without these figures, as in plans.
    """
    cells, plain = check(), check(lambda _: Engine())
    return f"{table(cells)}\n\n{summary(cells)}\n\n{WITHOUT_ENGINE} {summary(plain)}"
