"""Plan which CUDA graphs to capture in each mode. The plan only depends on facts known before the first step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.model_executor.cuda_graph_config import Backend

from sglang_shift.config import ShiftConfig
from sglang_shift.modes import MODES, Mode, StepState
from sglang_shift.policy.builtin import TokenThreshold


@dataclass(frozen=True)
class GraphPlan:
    """The sizes of the graphs of one phase, ascending. They are requests of a decode step, or tokens of a prefill.

    Attributes:
        sglang_sizes: SGLang's sizes. A step is padded to one of them, and this padded size can decide its mode.
        sizes: The sizes to capture in each mode.
    """

    sglang_sizes: tuple[int, ...] = ()
    sizes: dict[Mode, tuple[int, ...]] = field(default_factory=lambda: dict.fromkeys(MODES, ()))


def plan_graphs(
    sglang_sizes: Sequence[int],
    config: ShiftConfig,
    exact: bool = False,
    factor: float = math.inf,
    *,
    width: int = 1,
    steps_need_tp: bool = False,
) -> GraphPlan:
    """Capture each size in the modes in which a step of this size may run, and in no other.

    In SP, sizes are rounded up to multiples of S. A rank then has the same number of rows, and there are fewer graphs.
    ``--shift-graph-buckets`` limits the number of these graphs.

    Args:
        sglang_sizes: SGLang's sizes, ascending.
        config: It has the policy, its threshold, S, and the largest number of graphs in SP. If the policy or the
            threshold changes at run time, a step may find no graph.
        exact: Whether a graph only serves steps of its own size (``--disable-cuda-graph-padding``).
        factor: A step may be padded to at most ``factor`` times its tokens.
        width: Tokens of each request of a decode step, or 1 for prefills.
        steps_need_tp: Whether steps of any size may have to run in TP, whatever the policy chooses.
    """
    sizes = {mode: tuple(size for size in sglang_sizes if mode in modes_of(size * width, config)) for mode in MODES}
    if steps_need_tp:
        sizes[Mode.TP] = tuple(sglang_sizes)
    sp = round_up_sizes(sizes[Mode.SP], 1 if exact else config.sp_size)
    sizes[Mode.SP] = tuple(sp if config.graph_buckets is None else select_sizes(sp, config.graph_buckets, factor))
    return GraphPlan(tuple(sglang_sizes), sizes)


def modes_of(size: int, config: ShiftConfig) -> tuple[Mode, ...]:
    """The modes that the policy may choose for a step that is padded to ``size`` tokens.

    These are all modes if the choice depends on more than the size: on the queue, on measured times, or on the user's
    code. Measuring times also runs all modes.
    """
    if config.policy in MODES:
        return (Mode(config.policy),)
    if config.policy == "tokens":
        return (TokenThreshold(config.threshold).choose(StepState(size)),)
    return MODES


def warning_without_graphs(config: ShiftConfig, settings: Any) -> str | None:
    """One sentence for the log about the cost of no graphs in SP; None if the user has not asked for that.

    It is also None if that costs nothing: SGLang captures no graphs, the device is not a GPU, or no step runs in SP.

    Args:
        config: It has the policy, and the largest number of graphs in SP.
        settings: A view of the resolved server arguments.
    """
    graphs = settings.cuda_graph_config
    if all(phase.backend == Backend.DISABLED for phase in (graphs.decode, graphs.prefill)):
        return None
    if config.graph_buckets != 0 or settings.device != "cuda" or config.policy == Mode.TP.value:
        return None
    chosen = ", and calibrated chooses SP for fewer of them" if config.policy == "calibrated" else ""
    return (
        "--shift-graph-buckets 0: the CPU launches each kernel of every SP step, so one with little to compute, as "
        f"most decodes are, lasts as long as that takes{chosen}; more graphs take memory and start-up time instead"
    )


def select_sizes(sizes: Sequence[int], most: int, factor: float = math.inf) -> list[int]:
    """Choose at most ``most`` of the ascending ``sizes``: the largest, and from there down by a constant ratio.

    The ratio is such that the last size is the smallest of ``sizes``, but it is at most ``factor``. A step between two
    sizes that are further apart could find no graph.
    """
    if most >= len(sizes):
        return list(sizes)
    ratio = min(factor, (sizes[-1] / sizes[0]) ** (1 / (most - 1))) if most > 1 else factor
    selection: list[int] = []
    end = len(sizes)
    for i in range(most):
        target = max(sizes[-1] / ratio**i, selection[-1] / factor) if selection else sizes[-1]
        end = min(bisect_left(sizes, target), end - 1)  # below the last size, even if the next size is nearer than this
        if end < 0:
            break
        selection.append(sizes[end])
    return selection[::-1]


def padded(tokens: int, sizes: Sequence[int], factor: float = math.inf) -> int:
    """``tokens`` padded to the smallest of the ascending ``sizes`` that holds them.

    If no size holds them, or if that size is more than ``factor`` times as large, the result is ``tokens``. Such a
    step runs without a graph.
    """
    i = bisect_left(sizes, tokens)
    return sizes[i] if i < len(sizes) and sizes[i] <= factor * tokens else tokens


def round_up_sizes(sizes: Sequence[int], sp_size: int) -> list[int]:
    """Sizes for graphs of SP steps: multiples of S, so that a full graph has no rank with rows of padding.

    A size that is not a multiple of S is rounded up, so a graph still covers the largest batch. For S = 2 and 4,
    SGLang's default batch sizes above S are multiples. For S = 8, the size 12 is not a multiple.
    ``--cuda-graph-max-bs-decode`` may add a size that is not a multiple.
    """
    return sorted({-(-size // sp_size) * sp_size for size in sizes})
