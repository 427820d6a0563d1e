"""Compares ways to bound the gap between tokens: no bound, fixed chunks, and chunks that fit a target.

With fixed chunks, prompts and decodes share steps (Sarathi-Serve, arXiv 2403.02310), or take turns. The time of such a
step depends on the history of the prompt, so the gap has no bound that a user chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sglang_shift.cost.chunk_budget import ChunkBudget
from sglang_shift.cost.model import CostModel
from sglang_shift.modes import MODES, Mode
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.simulate.simulator import Server, simulate
from sglang_shift.simulate.traffic import Request, steady
from sglang_shift.tools.plan.hardware import NODE, gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.search import Trial, policy_of
from sglang_shift.tools.plan.step_time import StepTimes

CHUNKS = (512, 2048, 8192)
MOST_CHUNK = 16384
"""The largest chunk under a target. It is the chunk if no request decodes."""

MAX_RUNNING = 256
STUDY_RATES = (0.8, 1.4)
"""Requests per second of the traffic of :func:`study`."""


@dataclass(frozen=True)
class Way:
    """A way to serve prompts beside decodes.

    Attributes:
        name: Its name for the table.
        policy: ``tp`` or ``calibrated``.
        server: The limits of its batches.
    """

    name: str
    policy: str
    server: Server


HEADINGS = (
    "Policy", "Prompts beside decodes", "Mean TTFT, s", "p99 TTFT, s", "Mean gap, ms", "p99 gap, ms", "Longest gap, ms",
    "Mean E2E, s",
)  # fmt: skip

EXPLANATION = (
    "Requests that decode wait for steps with prompts. Prompts come first (SGLang's default), share steps with decodes "
    "(mixed), or take turns with them. The number is the chunk. With a target, the chunk of each step is what fits it."
)


def ways(costs: CostModel, target: float, pool: int, shifts: bool) -> Iterator[Way]:
    """Yield the ways to compare.

    Args:
        costs: Step times of a replica.
        target: The bound, in seconds.
        pool: Tokens of the KV cache.
        shifts: Whether the replica has both modes. Otherwise, every step runs in TP.
    """
    for policy in ("tp", "calibrated") if shifts else ("tp",):
        modes = MODES if policy == "calibrated" else (Mode.TP,)
        budget = ChunkBudget(costs, target, modes=modes)
        yield Way("prompts first, 8192", policy, Server(8192, pool, MAX_RUNNING))
        for chunk in CHUNKS:
            yield Way(f"mixed, {chunk}", policy, Server(chunk, pool, MAX_RUNNING, mixed=True))
        yield Way("in turns, 8192", policy, Server(8192, pool, MAX_RUNNING, interval=1))
        words = f"target {1e3 * target:g} ms"
        yield Way(f"{words}, mixed", policy, Server(MOST_CHUNK, pool, MAX_RUNNING, mixed=True, budget=budget))
        yield Way(f"{words}, in turns", policy, Server(MOST_CHUNK, pool, MAX_RUNNING, budget=budget))


def compare(
    requests: Sequence[Request],
    costs: CostModel,
    target: float,
    pool: int,
    shifts: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> str:
    """Simulate every way, and return a Markdown table. The arguments are those of :func:`ways`."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---" + "|--:" * (len(HEADINGS) - 2) + "|"]
    for way in ways(costs, target, pool, shifts):
        name = "shift" if way.policy == "calibrated" else "TP"
        progress(f"{name}, {way.name}")
        result = simulate(requests, policy_of(way.policy, costs, way.server.chunk), costs, way.server)
        m = result.metrics()
        numbers = [f"{m['mean_ttft']:.2f}", f"{m['p99_ttft']:.1f}"]
        numbers += [f"{1e3 * m[name]:,.0f}" for name in ("mean_gap", "p99_gap", "max_gap")]
        lines.append("| " + " | ".join([name, way.name, *numbers, f"{m['mean_e2e']:.1f}"]) + " |")
    return "\n".join(lines)


def section(trial: Trial, requests: Sequence[Request], target: float, progress: Callable[[str], None]) -> str:
    """Compare the ways for one replica of a plan, and return a section of Markdown.

    Args:
        trial: The recommended candidate. A replica gets its share of the requests.
        requests: The traffic.
        target: The bound, in seconds.
        progress: Called with the description of each way before it is tried.
    """
    candidate = trial.candidate
    share = sorted(requests, key=lambda r: r.time)[:: candidate.replicas]
    table = compare(share, trial.costs, target, trial.memory.tokens, candidate.layout.sp_size > 1, progress)
    return f"\n## Gaps between tokens, with a bound of {1e3 * target:g} ms\n\n{EXPLANATION}\n\n{table}"


def study(model: Model, target: float = 0.1, progress: Callable[[str], None] = lambda _: None) -> str:
    """Compare the ways on 8 x H200, with 300 requests whose prompts have 1000 to 64000 tokens, as Markdown.

    The requests arrive at the rates of :data:`STUDY_RATES`.
    """
    gpu, layout = gpus()["H200"], RankLayout(NODE, NODE)
    costs = StepTimes(model, gpu, layout).cost_model()
    pool = memory(model, gpu, layout, MOST_CHUNK, shifts=True).tokens
    parts = [f"# Gaps between tokens: {model.name} ({model.weights}) on {NODE} x {gpu.name}\n\n{EXPLANATION}\n"]
    for rate in STUDY_RATES:
        requests = steady(rate, prompt=(1000, 64_000), output=(50, 500), requests=300, seed=3)
        parts.append(f"## {rate:g} requests/s, 300 prompts of 1000 to 64000 tokens, outputs of 50 to 500\n")
        parts.append(compare(requests, costs, target, pool, True, progress) + "\n")
    return "\n".join(parts)
