"""Which CUDA graphs are captured in which mode: a pure function of what is known before the first step."""

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
    """The sizes of one phase's graphs, ascending: requests of a decode step, or tokens of a prefill.

    Attributes:
        ladder: SGLang's sizes. The one that a step is padded to decides its mode.
        sizes: What is captured in each mode.
    """

    ladder: tuple[int, ...] = ()
    sizes: dict[Mode, tuple[int, ...]] = field(default_factory=lambda: dict.fromkeys(MODES, ()))


def plan_graphs(ladder: Sequence[int], config: ShiftConfig, exact: bool = False, factor: float = math.inf) -> GraphPlan:
    """Capture each size in the modes that the policy may choose for it, and in no other.

    In SP, sizes are rounded up to multiples of S: a rank's rows are as many, and there are fewer
    graphs. Of these, ``--shift-graph-buckets`` keeps so many.

    Args:
        ladder: SGLang's sizes, ascending.
        config: Policy, threshold, S and the bound. A policy or threshold that is set later, at run
            time, may ask for a graph that was not captured.
        exact: A graph serves steps of its own size only (``--disable-cuda-graph-padding``).
        factor: A step is padded to at most so many times its tokens.
    """
    sizes = {mode: tuple(size for size in ladder if mode in modes_of(size, config)) for mode in MODES}
    sp = graph_batch_sizes_suit(sizes[Mode.SP], 1 if exact else config.sp_size)
    sizes[Mode.SP] = tuple(sp if config.graph_buckets is None else thinned(sp, config.graph_buckets, factor))
    return GraphPlan(tuple(ladder), sizes)


def modes_of(size: int, config: ShiftConfig) -> tuple[Mode, ...]:
    """The modes that the policy may choose for a step that is padded to ``size``.

    All, where that depends on more than the size: on the queue, on measured times (and measuring runs
    all), on the user's code.
    """
    if config.policy in MODES:
        return (Mode(config.policy),)
    if config.policy == "tokens":
        return (TokenThreshold(config.threshold).choose(StepState(size)),)
    return MODES


def price_of_no_graphs(config: ShiftConfig, settings: Any) -> str | None:
    """What it costs that the user wants no graphs in SP, in a sentence for the log; None where it costs nothing.

    Args:
        config: The bound, and the policy.
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


def thinned(sizes: Sequence[int], most: int, factor: float = math.inf) -> list[int]:
    """At most ``most`` of the ascending ``sizes``, from the largest down in steps of one ratio.

    The ratio is the one that would reach the smallest size, but no more than ``factor``: between sizes further
    apart, steps would find no graph.
    """
    if most >= len(sizes):
        return list(sizes)
    ratio = min(factor, (sizes[-1] / sizes[0]) ** (1 / (most - 1))) if most > 1 else factor
    kept: list[int] = []
    end = len(sizes)
    for i in range(most):
        wanted = max(sizes[-1] / ratio**i, kept[-1] / factor) if kept else sizes[-1]
        end = min(bisect_left(sizes, wanted), end - 1)  # the next one below the last, if none is as far away as that
        if end < 0:
            break
        kept.append(sizes[end])
    return kept[::-1]


def padded(tokens: int, sizes: Sequence[int], factor: float = math.inf) -> int:
    """``tokens`` padded to the smallest of the ascending ``sizes`` that holds them.

    ``tokens`` itself where none does, or where that one is more than ``factor`` times as large: such a
    step runs without a graph.
    """
    i = bisect_left(sizes, tokens)
    return sizes[i] if i < len(sizes) and sizes[i] <= factor * tokens else tokens


def graph_batch_sizes_suit(sizes: Sequence[int], sp_size: int) -> list[int]:
    """Sizes for graphs of SP steps: multiples of S, so that no rank's rows are padding.

    A size that is no multiple is rounded up: the largest batch stays covered. SGLang's default batch
    sizes above S are multiples for S = 2 and 4; for S = 8, 12 is not; ``--cuda-graph-max-bs-decode``
    may add one.
    """
    return sorted({-(-size // sp_size) * sp_size for size in sizes})
