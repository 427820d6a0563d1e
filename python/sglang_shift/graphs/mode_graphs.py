"""The CUDA graphs of both modes: captured one set after the other, and swapped by a step's mode."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.graph_memory_usage import merge_graph_memory_usage, merge_graph_time_usage
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import (
    capture_decode_graph,
    capture_prefill_graph,
)
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import _MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_exec, get_observability

from sglang_shift.config import ShiftConfig
from sglang_shift.graphs.plan import GraphPlan, padded, plan_graphs
from sglang_shift.modes import Mode
from sglang_shift.seams import relies_on

logger = logging.getLogger(__name__)

RUNNERS = {Phase.DECODE: "decode_cuda_graph_runner", Phase.PREFILL: "prefill_cuda_graph_runner"}
"""Where SGLang's model runner has the graph runner of each phase."""
SIZES = {Phase.DECODE: "capture_bs", Phase.PREFILL: "capture_num_tokens"}
"""What a graph runner calls the sizes that it captured."""


@dataclass
class PhaseGraphs:
    """The graphs of one phase.

    Attributes:
        plan: The sizes that were to be captured.
        factor: A step is padded to at most so many times its tokens.
        sp_runner: The graph runner of SP; None where its steps run eagerly.
        sp_gib: Device memory that SP's graphs took, in GiB.
        sp_seconds: How long they took to capture.
        sizes: Those captured, by mode.
        replayed: Steps that replayed a graph, by mode.
        missed: Steps that found no graph, and ran eagerly, by mode.
    """

    plan: GraphPlan = field(default_factory=GraphPlan)
    factor: float = math.inf
    sp_runner: Any = None
    sp_gib: float = 0.0
    sp_seconds: float = 0.0
    sizes: dict[Mode, tuple[int, ...]] = field(default_factory=lambda: dict.fromkeys(Mode, ()))
    replayed: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))
    missed: dict[Mode, int] = field(default_factory=lambda: dict.fromkeys(Mode, 0))

    def buckets(self, tokens: int) -> tuple[int, int]:
        """``tokens`` padded: to the size that decides the mode, and to the graph that a step in SP replays."""
        sp = padded(tokens, self.sizes[Mode.SP], self.factor)
        return padded(tokens, self.plan.ladder, self.factor), sp

    def count(self, mode: Mode, replayed: bool) -> bool | None:
        """Count a step. True where it replayed a graph, False where none fitted, None where the phase has none."""
        if not any(self.sizes.values()):
            return None
        (self.replayed if replayed else self.missed)[mode] += 1
        return replayed

    def report(self) -> dict[str, Any]:
        """A JSON value, for ``/server_info``."""
        value = {
            mode.value: {
                "sizes": list(self.sizes[mode]),
                "replayed": self.replayed[mode],
                "missed": self.missed[mode],
            }
            for mode in Mode
        }
        value[Mode.SP.value] |= {"gib": round(self.sp_gib, 3), "seconds": round(self.sp_seconds, 2)}
        return value


class ModeGraphs:
    """The CUDA graphs of one model runner in both modes.

    SGLang captures TP's and keeps their runners. SP's are captured after them, by subclasses of the same
    runners, in the same memory pool; while a step runs in SP, they are the model runner's.

    Args:
        runner: A :class:`sglang_shift.runtime.model_runner.ShiftModelRunner` with its attention backend.
        config: Policy, S, and the bound of the second set.
    """

    @relies_on(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner.can_replay_locally",
        "it says how far a prefill may be padded",
    )
    def __init__(self, runner: Any, config: ShiftConfig) -> None:
        self.runner = runner
        exact = get_exec().graph.disable_cuda_graph_padding
        factors = {Phase.DECODE: 1.0 if exact else math.inf, Phase.PREFILL: _MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR}
        plans = {phase: plan_graphs(ladder, config, exact, factors[phase]) for phase, ladder in ladders(runner).items()}
        if get_observability().forward_hooks:
            # SGLang registers these after its own capture, so that no graph has them.
            plans = {phase: GraphPlan(plan.ladder, plan.tp) for phase, plan in plans.items()}
        self.phases = {phase: PhaseGraphs(plan, factors[phase]) for phase, plan in plans.items()}

    def of(self, prefill: bool) -> PhaseGraphs:
        """Those that a step with prompt tokens, or without, may replay."""
        return self.phases[Phase.PREFILL if prefill else Phase.DECODE]

    def capture(self, capture_tp: Callable[[], None], phases: tuple[str, ...] = Phase.ALL) -> None:
        """Capture both sets; each size only in the modes that the plan says.

        Args:
            capture_tp: SGLang's own capture, of all ``phases``.
            phases: Those to capture.
        """
        if not any(self.phases[phase].plan.ladder for phase in phases):
            capture_tp()
            return
        runner, plans = self.runner, {phase: self.phases[phase].plan for phase in phases}
        for phase in phases:
            self.phases[phase].sp_runner = None  # captured again: its memory is needed
        # The one buffer for logits is as large as the largest graph of either set.
        with limited({phase: plan.tp + plan.sp for phase, plan in plans.items()}):
            logits = runner.graph_shared_output = GraphSharedOutput.create_for_model_runner(runner)
        with limited({phase: plan.tp for phase, plan in plans.items()}):
            capture_tp()
        runner.graph_shared_output = logits
        with limited({phase: plan.sp for phase, plan in plans.items()}), in_sp(runner):
            for phase in reversed(phases):  # as SGLang does: prefills first
                self._capture_sp(phase)
        for phase in phases:
            self._take_stock(phase)

    @relies_on(
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:capture_decode_graph",
        "it builds the runner of _decode_cuda_graph_runner_cls, and measures",
    )
    @relies_on(
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:capture_prefill_graph",
        "it builds a PrefillCudaGraphRunner, and measures",
    )
    def _capture_sp(self, phase: str) -> None:
        graphs, runner = self.phases[phase], self.runner
        if not graphs.plan.sp:
            return
        logger.info("sglang_shift: capturing the CUDA graphs of SP (%s)", phase)
        if phase == Phase.PREFILL:
            captured = capture_prefill_graph(model_runner=runner, eager_runner=runner.eager_runner)
        else:
            captured = capture_decode_graph(model_runner=runner)
        # Where SGLang captures no graphs of this phase, it returns none, or its eager runner.
        graphs.sp_runner = captured.runner if hasattr(captured.runner, SIZES[phase]) else None
        graphs.sp_gib, graphs.sp_seconds = captured.memory_usage_gb, captured.capture_time
        runner.graph_memory_usage = merge_graph_memory_usage(runner.graph_memory_usage, captured.memory_usage)
        runner.graph_time_usage = merge_graph_time_usage(runner.graph_time_usage, captured.time_usage)

    def _take_stock(self, phase: str) -> None:
        graphs = self.phases[phase]
        runners = {Mode.TP: getattr(self.runner, RUNNERS[phase]), Mode.SP: graphs.sp_runner}
        graphs.sizes = {mode: tuple(getattr(runner, SIZES[phase], ())) for mode, runner in runners.items()}
        logger.info(
            "sglang_shift: CUDA graphs (%s): TP %s; SP %s, %.2f GiB, %.1f s",
            phase,
            spelled(graphs.sizes[Mode.TP]),
            spelled(graphs.sizes[Mode.SP]),
            graphs.sp_gib,
            graphs.sp_seconds,
        )

    @contextmanager
    def used(self, mode: Mode) -> Iterator[None]:
        """Inside, the model runner has the graphs of ``mode``, and no others."""
        if mode is Mode.TP:
            yield
            return
        tp = {name: getattr(self.runner, name) for name in RUNNERS.values()}
        for phase, name in RUNNERS.items():
            setattr(self.runner, name, self.phases[phase].sp_runner)
        try:
            yield
        finally:
            for name, runner in tp.items():
                setattr(self.runner, name, runner)

    def captured(self) -> dict[str, dict[str, list[int]]]:
        """The sizes that were captured, by phase and mode; empty where none were."""
        captured = {
            phase: {mode.value: list(sizes) for mode, sizes in graphs.sizes.items()}
            for phase, graphs in self.phases.items()
        }
        return captured if any(any(by_mode.values()) for by_mode in captured.values()) else {}

    def report(self) -> dict[str, Any]:
        """A JSON value, for ``/server_info``: by phase and mode."""
        return {phase: graphs.report() for phase, graphs in self.phases.items()}


@relies_on(
    "sglang.srt.model_executor.runner.base_cuda_graph_runner:get_batch_sizes_to_capture",
    "it says which batch sizes are captured",
)
def ladders(runner: Any) -> dict[str, list[int]]:
    """The sizes that SGLang would capture, by phase."""
    sizes: dict[str, list[int]] = {phase: [] for phase in Phase.ALL}
    if not current_platform.capabilities.graph_capture:
        return sizes
    if not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        sizes[Phase.DECODE], _ = get_batch_sizes_to_capture(
            runner,
            runner.decode_num_tokens_per_req(),
            gathered_buffer_required=any(runner.decode_graph_gather_requirements()),
        )
    if not check_cuda_graph_backend(Phase.PREFILL, Backend.DISABLED):
        # As capture_prefill_graph: its dummy batch can have no more tokens.
        most = runner.req_to_token_pool.size * runner.model_config.context_len
        wanted = get_exec().graph.cuda_graph_config.prefill.bs or []
        sizes[Phase.PREFILL] = sorted(size for size in wanted if size <= most)
    return sizes


@contextmanager
def limited(sizes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Inside, SGLang captures these sizes only, by phase; where there are none, nothing."""
    config = get_exec().graph.cuda_graph_config
    before = {phase: (config[phase].bs, config[phase].backend) for phase in sizes}
    for phase, of_phase in sizes.items():
        if of_phase:
            config[phase].bs = list(of_phase)
        else:
            config[phase].backend = Backend.DISABLED
    try:
        yield
    finally:
        for phase, (bs, backend) in before.items():
            config[phase].bs, config[phase].backend = bs, backend


@contextmanager
def in_sp(runner: Any) -> Iterator[None]:
    """Inside, the graph runners that SGLang builds for ``runner`` are those of SP."""
    runner.capture_mode = Mode.SP
    try:
        yield
    finally:
        runner.capture_mode = Mode.TP


def spelled(sizes: tuple[int, ...]) -> str:
    """How many sizes there are, and from where to where."""
    return f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}" if sizes else "none"
