"""A plan in words, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_shift.benchmark.plots import DPI, KNOWN, panels
from sglang_shift.cost_model import PHASES, CostModel
from sglang_shift.plan.model import Model
from sglang_shift.plan.search import Candidate, Outcome, Plan
from sglang_shift.sizing import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = (
    "Replicas", "P", "S", "Chunk", "Policy", "TTFT, ms", "TPOT, ms", "E2E, s", "p99 E2E, s", "Peak tokens/s",
    "Weights", "Shift", "Reserve", "KV cache, GiB", "KV tokens",
)  # fmt: skip

KINDS = {"stock-tp": "TP alone", "sp": "SP alone", "shift": "shift"}
"""What a picture tells apart, by the names of the benchmark's styles."""


def text(plan: Plan, model: Model, gpus: str, traffic: str) -> str:
    """The whole plan, as Markdown.

    Args:
        plan: The plan.
        model: Of what.
        gpus: As given.
        traffic: What it is for, in words.
    """
    best = plan.best.candidate
    lines = [
        f"# {model.name} ({model.weights}) on {gpus}\n",
        f"Traffic: {traffic}.\n",
        f"Recommended: {_words(best)}. Each replica is a server of its own, started with\n",
        f"    {' '.join(flags(best))}\n",
        f"Faster mode, predicted: {_crossovers(plan.best.costs) if best.layout.sp_size > 1 else 'TP, as S is 1'}.",
    ]
    if model.quantized:
        lines.append("\nsglang_shift does not serve quantized models yet: this plan is for when it does.")
    lines += [
        "\n## Layouts\n",
        "Memory is of one GPU, in GiB: the full-TP shard, what Shift needs beside it, activations and graphs, KV cache."
        " TTFT, TPOT and E2E are means. Peak: all requests at once.\n",
        table(plan.layouts, plan.best),
        "\n## Chunks and policies of the best layout\n",
        table(plan.settings, plan.best),
        "\nPredicted, not measured: docs/cost-model.md says from what, and how far such predictions are off.",
    ]
    return "\n".join(lines)


def flags(candidate: Candidate) -> list[str]:
    """A replica's, for ``python -m sglang_shift.launch_server``."""
    layout = candidate.layout
    given = ["--tp-size", str(layout.world_size), "--chunked-prefill-size", str(candidate.chunk)]
    if layout.sp_size > 1 and candidate.policy != "tp":
        given += ["--sp-size", str(layout.sp_size)]
        if candidate.shifts:
            given.append("--enable-shift-parallel")
        if candidate.policy.startswith("tokens "):
            given += ["--shift-policy", "tokens", "--shift-threshold", candidate.policy.removeprefix("tokens ")]
    return given


def _words(candidate: Candidate) -> str:
    layout, n = candidate.layout, candidate.replicas
    replicas = "one replica" if n == 1 else f"{n} replicas"
    modes = f"S = {layout.sp_size}, policy {candidate.policy}" if layout.sp_size > 1 else "TP alone"
    return f"{replicas} of P = {layout.world_size} GPUs, {modes}, chunks of {candidate.chunk} tokens"


def _crossovers(costs: CostModel) -> str:
    found = {p: [f"{m.value.upper()} from {n}" for n, m in costs.crossovers(p)] for p in PHASES}
    return "; ".join(f"{phase} {', '.join(words)}" for phase, words in found.items()) + " tokens on"


def table(outcomes: Sequence[Outcome], best: Outcome) -> str:
    """One row each; the best's is bold."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "--:|" * len(HEADINGS)]
    for outcome in outcomes:
        cells = _cells(outcome)
        if outcome.candidate == best.candidate:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(outcome: Outcome) -> list[str]:
    c, held, m = outcome.candidate, outcome.memory, outcome.metrics
    times = ["too little memory", "", "", "", ""]
    if m:
        times = [f"{1e3 * m['mean_ttft']:.0f}", f"{1e3 * m['mean_tpot']:.1f}", f"{m['mean_e2e']:.2f}",
                 f"{m['p99_e2e']:.2f}", f"{outcome.peak:.0f}"]  # fmt: skip
    sizes = [f"{size / GIB:.1f}" for size in (held.weights, held.shift, held.reserve, held.pool)]
    where = [str(n) for n in (c.replicas, c.layout.world_size, c.layout.sp_size, c.chunk)]
    return [*where, c.policy, *times, *sizes, str(held.tokens)]


def plot(plan: Plan, title: str, path: Path) -> None:
    """Latency against peak throughput of all that was tried, as a PNG.

    Raises:
        ShiftError: matplotlib is not installed.
    """
    caption = "lower and further right is better; P/S beside each layout, the plan ringed"
    figure, axes = panels(f"{title}\n{caption}", 1, 2, 4.4)
    tried = {o.candidate: o for o in (*plan.layouts, *plan.settings) if o.metrics}
    for ax, metric, label in zip(axes, ("mean_ttft", "mean_tpot"), ("TTFT", "TPOT"), strict=True):
        points = {candidate: (o.peak, 1e3 * o.metrics[metric]) for candidate, o in tried.items()}
        for kind, words in KINDS.items():
            mine = [point for candidate, point in points.items() if _kind(candidate) == kind]
            if mine:
                ax.plot(*zip(*mine, strict=True), linestyle="", label=words, **KNOWN[kind])
        ax.plot(*points[plan.best.candidate], "o", markersize=13, markerfacecolor="none", color="black")
        _name_layouts(ax, plan, points)
        ax.set_xlabel("peak prompt and output tokens/s")
        ax.set_ylabel(f"mean {label}, ms")
        ax.set_yscale("log")
        for set_format in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_format("{x:g}")
        ax.margins(0.15, 0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(path, dpi=DPI)


def _name_layouts(ax: Axes, plan: Plan, points: Mapping[Candidate, tuple[float, float]]) -> None:
    for outcome in plan.layouts:
        candidate = outcome.candidate
        if candidate in points:
            name = f"{candidate.layout.world_size}/{candidate.layout.sp_size}"
            ax.annotate(name, points[candidate], xytext=(6, 4), textcoords="offset points", fontsize=7)


def _kind(candidate: Candidate) -> str:
    return "shift" if candidate.shifts else "sp" if candidate.policy == "sp" else "stock-tp"
