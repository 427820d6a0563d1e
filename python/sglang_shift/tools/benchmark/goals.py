"""Judges the goals of instances: how they must compare with static layouts of the same ranks and the same memory."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.tools.benchmark.contenders import INSTANCES
from sglang_shift.tools.benchmark.figures import COMPLETED, SHIFT, Comparison, best_of

STATIC = ("stock-tp", "stock-dp", "sp", SHIFT)
"""The contenders whose layout never changes."""
RARE = "mixed-lengths 0.2%"


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of a figure of instances to the best figure of other contenders.

    Attributes:
        kind: The kind of workload.
        metric: The figure.
        others: The other contenders.
        bound: The least ratio if a higher figure is better, or else the largest.
        workload: The only workload of the kind for which the goal holds; None means all.
        serve_all: Whether only those of the others count that answered every request.
    """

    kind: str
    metric: str
    others: tuple[str, ...]
    bound: float
    workload: str | None = None
    serve_all: bool = False

    def met(self, ratio: float) -> bool:
        """Return whether a ratio reaches the bound."""
        return ratio >= self.bound if best_of(self.metric) is max else ratio <= self.bound


GOALS = (
    Goal("mixed-lengths", COMPLETED, STATIC, 1.75, RARE, serve_all=True),
    Goal("mixed-lengths", COMPLETED, (SHIFT,), 0.98),
    Goal("closed-loop", COMPLETED, ("stock-dp",), 0.97),
    Goal("closed-loop", COMPLETED, (SHIFT,), 0.98),
    Goal("single", "e2e_p50", ("stock-tp",), 1.02),
    *(Goal(kind, COMPLETED, (SHIFT,), 0.98) for kind in ("day", "azure", "mooncake")),
)


def table(comparison: Comparison) -> str:
    """Return the goals with their ratios as a Markdown table. It is empty if no instances were measured."""
    rows = [
        _row(comparison, contender, goal, workload)
        for contender in comparison.contenders
        if contender.startswith(INSTANCES)
        for goal in GOALS
        for workload in comparison.of_kind(goal.kind)
        if goal.workload in (None, workload) and comparison.has_visit(contender, workload)
    ]
    judged = [row for row in rows if row]
    head = ["| contender | workload | goal | got | |", "| --- | --- | --- | --: | --- |"]
    return "\n".join([*head, *judged]) if judged else ""


def _row(comparison: Comparison, contender: str, goal: Goal, workload: str) -> str | None:
    """Return a row, or None if there is nobody to compare with."""
    others = [c for c in goal.others if comparison.has_visit(c, workload)]
    if goal.serve_all:
        others = [c for c in others if serves_all(comparison, c, workload)]
    ratio = comparison.ratio(contender, others, workload, goal.metric) if others else None
    if ratio is None:
        return None
    bound = f"{goal.metric} {'>=' if best_of(goal.metric) is max else '<='} {goal.bound:g} x"
    than = ("the best of " if len(others) > 1 else "") + ", ".join(f"`{c}`" for c in others)
    verdict = "met" if goal.met(ratio.median) else "**missed**"
    spread = f" ({ratio.low:.3f} to {ratio.high:.3f})" if ratio.rounds > 1 else ""
    return f"| `{contender}` | `{workload}` | {bound} {than} | {ratio.median:.3f}{spread} | {verdict} |"


def serves_all(comparison: Comparison, contender: str, workload: str) -> bool:
    """Return whether a contender refused and failed no request of a workload. Late answers count as served."""
    return not any(
        number
        for metric in ("rejected", "errors")
        for number in comparison.values(contender, workload, metric).values()
    )
