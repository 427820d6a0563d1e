"""Presents a plan in words, as tables and as a picture."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_shift.cost.model import PHASES, CostModel
from sglang_shift.errors import ShiftError
from sglang_shift.models.sizes import GIB, REPLICATED
from sglang_shift.tools.plan.memory import Memory
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.notes import notes
from sglang_shift.tools.plan.search import PEAK_REQUESTS, RATIO_ERROR, Candidate, Plan, Trial
from sglang_shift.tools.plotting import DPI, STYLES, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADINGS = (
    "Replicas", "P", "S", "Chunk", "Policy", "TTFT, ms", "TPOT, ms", "E2E, s", "p99 E2E, s", "Peak tokens/s",
    "Weights", "Shift", "Reserve", "KV cache, GiB", "KV tokens",
)  # fmt: skip

PREDICTION_ERROR = 0.25
"""The average error of such predictions, compared with the paper's table: docs/cost-model.md."""

KINDS = {"stock-tp": "TP alone", "sp": "SP alone", "shift": "shift"}
"""The kinds of candidates that a picture shows, by the names of the benchmark's styles."""


def text(plan: Plan, model: Model, gpus: str, traffic: str) -> str:
    """Return the whole plan as Markdown.

    Args:
        plan: The plan.
        model: The model that the plan is for.
        gpus: The GPUs as the user gave them.
        traffic: The traffic in words.
    """
    best = plan.best.candidate
    command = ["python", "-m", "sglang_shift.launch_server", *flags(best, plan.best.memory, model.path, plan.kv_dtype)]
    if model.context_is_given:
        command += ["--context-length", str(model.context)]
    if model.experts == REPLICATED and best.layout.sp_size > 1:
        command += ["--shift-experts", REPLICATED]
    lines = [
        f"# {model.name} ({model.weights}, KV cache in {plan.kv_dtype}) on {gpus}\n",
        f"Traffic: {traffic}.\n",
        *([_overload(plan)] if plan.overloaded else []),
        f"Recommended: {_words(best, plan.gpus)}. Each replica is a server of its own, started with\n",
        f"    {shlex.join(command)}\n",
        f"Faster mode, predicted: {_crossovers(plan.best.costs) if best.layout.sp_size > 1 else 'TP, as S is 1'}.\n",
        _alternatives(plan),
    ]
    lines += [
        *(f"\n{note}" for note in notes(model)),
        "\n## Layouts\n",
        "Memory is of one GPU, in GiB: the full-TP shard, what SP and Shift need beside it, activations and graphs, KV"
        f" cache. TTFT, TPOT and E2E are means. Peak: {PEAK_REQUESTS} such requests at once.\n",
        table(plan.layouts, plan),
        "\n## Chunks and policies of the best layout\n",
        table(plan.settings, plan),
        f"\nPredicted, not measured, and without an engine's own times: {PREDICTION_ERROR:.0%} off on average beside "
        "the Shift Parallelism paper's table. docs/cost-model.md says from what.",
    ]
    return "\n".join(lines)


def flags(candidate: Candidate, memory: Memory, path: str, kv_dtype: str) -> list[str]:
    """Return the flags with which ``python -m sglang_shift.launch_server`` starts the simulated replica."""
    layout = candidate.layout
    arguments = [
        "--model-path",
        path,
        "--tp-size",
        str(layout.world_size),
        "--chunked-prefill-size",
        str(candidate.chunk),
    ]
    if kv_dtype == "fp8":
        arguments += ["--kv-cache-dtype", "fp8_e4m3"]
    if memory.graphs:
        # The server also lowers SGLang's default for a second mode's graphs (graph_memory). This value was simulated.
        arguments += ["--mem-fraction-static", f"{(memory.total - memory.reserve - memory.graphs) / memory.total:.3f}"]
    if candidate.token_shards > 1:
        arguments += ["--dcp-size", str(candidate.token_shards), "--attention-backend", "triton"]
    if layout.sp_size > 1:
        arguments += ["--sp-size", str(layout.sp_size)]
        if candidate.shifts:
            arguments.append("--enable-shift-parallel")
        if candidate.policy.startswith("tokens "):
            arguments += ["--shift-policy", "tokens", "--shift-threshold", candidate.policy.removeprefix("tokens ")]
    return arguments


def _words(candidate: Candidate, gpus: int) -> str:
    layout, n = candidate.layout, candidate.replicas
    replicas = "one replica" if n == 1 else f"{n} replicas"
    modes = f"S = {layout.sp_size}, policy {candidate.policy}" if layout.sp_size > 1 else "TP alone"
    if candidate.token_shards > 1:
        modes += f", KV cache divided by token over D = {candidate.token_shards}"
    idle = f", {left} of {gpus} GPUs idle" if (left := _idle(candidate, gpus)) else ""
    return f"{replicas} of P = {layout.world_size} GPUs, {modes}, chunks of {candidate.chunk} tokens{idle}"


def _idle(candidate: Candidate, gpus: int) -> int:
    return gpus - candidate.replicas * candidate.layout.world_size


def _overload(plan: Plan) -> str:
    return (
        f"The traffic brings {plan.offered_load:,.0f} tokens/s, more than any layout serves "
        f"(at most {plan.highest_peak:,.0f}): latencies grow for as long as it lasts, and what is recommended has the "
        "highest peak.\n"
    )


def _alternatives(plan: Plan) -> str:
    off = f"Where it compares two ways to serve, the model is {RATIO_ERROR:.0%} off on average."
    if not plan.alternatives:
        return f"{off} Nothing else that was tried comes within that."
    measure = "time per token at the peak" if plan.overloaded else "mean end-to-end time"
    others = [f"- {_words(candidate, plan.gpus)}: {more:+.1%}" for candidate, more in plan.alternatives.items()]
    return "\n".join([f"{off} These are within that ({measure}), so prefer the simplest:\n", *others])


def _crossovers(costs: CostModel) -> str:
    crossovers = {p: [f"{m.value.upper()} from {n}" for n, m in costs.crossovers(p)] for p in PHASES}
    return "; ".join(f"{phase} {', '.join(words)}" for phase, words in crossovers.items()) + " tokens on"


def table(trials: Sequence[Trial], plan: Plan) -> str:
    """Return a table with one row for each trial. The row of the best trial is bold."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "--:|" * len(HEADINGS)]
    for trial in trials:
        cells = _cells(trial, plan.gpus)
        if trial.candidate == plan.best.candidate:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(trial: Trial, gpus: int) -> list[str]:
    c, memory, m = trial.candidate, trial.memory, trial.metrics
    times = ["too little memory", "", "", "", ""]
    if m:
        times = [f"{1e3 * m['mean_ttft']:.0f}", f"{1e3 * m['mean_tpot']:.1f}", f"{m['mean_e2e']:.2f}",
                 f"{m['p99_e2e']:.2f}", f"{trial.peak:.0f}"]  # fmt: skip
    sizes = [f"{size / GIB:.1f}" for size in (memory.weights, memory.base + memory.graphs, memory.reserve, memory.pool)]
    replicas = f"{c.replicas} ({idle} idle)" if (idle := _idle(c, gpus)) else str(c.replicas)
    where = [replicas, *map(str, (c.layout.world_size, c.layout.sp_size, c.chunk))]
    return [*where, c.policy, *times, *sizes, str(memory.tokens)]


def check_plot(path: Path) -> None:
    """Check before a search that :func:`plot` can work.

    Raises:
        ShiftError: matplotlib is not installed, or the folder is not there.
    """
    panels("", 1, 1, 1.0)
    if not path.parent.is_dir():
        raise ShiftError(f"--plot {path}: there is no folder {path.parent}; make it or give another")


def plot(plan: Plan, title: str, path: Path) -> None:
    """Draw latency against peak throughput of all candidates that were tried, as a PNG.

    Raises:
        ShiftError: matplotlib is not installed, or the file cannot be written.
    """
    caption = "lower and further right is better; P/S beside each layout, the plan ringed"
    figure, axes = panels(f"{title}\n{caption}", 1, 2, 4.4)
    for ax, metric, label in zip(axes, ("mean_ttft", "mean_tpot"), ("TTFT", "TPOT"), strict=True):
        points = {candidate: (o.peak, 1e3 * o.metrics[metric]) for candidate, o in plan.trials.items()}
        for kind, words in KINDS.items():
            mine = [point for candidate, point in points.items() if _kind(candidate) == kind]
            if mine:
                ax.plot(*zip(*mine, strict=True), linestyle="", label=words, **STYLES[kind])
        ax.plot(*points[plan.best.candidate], "o", markersize=13, markerfacecolor="none", color="black")
        _name_layouts(ax, plan, points)
        ax.set_xlabel("peak prompt and output tokens/s")
        ax.set_ylabel(f"mean {label}, ms")
        ax.set_yscale("log")
        for set_format in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_format("{x:g}")
        ax.margins(0.15, 0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False)
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise ShiftError(f"--plot {path} cannot be written: {error.strerror}") from error


def _name_layouts(ax: Axes, plan: Plan, points: Mapping[Candidate, tuple[float, float]]) -> None:
    for trial in plan.layouts:
        candidate = trial.candidate
        if candidate in points:
            name = f"{candidate.layout.world_size}/{candidate.layout.sp_size}"
            ax.annotate(name, points[candidate], xytext=(6, 4), textcoords="offset points", fontsize=7)


def _kind(candidate: Candidate) -> str:
    return "shift" if candidate.shifts else "sp" if candidate.policy == "sp" else "stock-tp"
