"""Capture the CUDA graphs of every mode, one set after the other. The mode of a step selects its set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
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
from sglang.srt.runtime_context import get_exec, get_lora, get_observability

from sglang_shift.config import ShiftConfig
from sglang_shift.graphs.plan import GraphPlan, padded, plan_graphs
from sglang_shift.modes import MODES, Mode
from sglang_shift.seams import relies_on

logger = logging.getLogger(__name__)

RUNNERS = {Phase.DECODE: "decode_cuda_graph_runner", Phase.PREFILL: "prefill_cuda_graph_runner"}
"""The attribute of SGLang's model runner that holds the graph runner of each phase."""
SIZES = {Phase.DECODE: "capture_bs", Phase.PREFILL: "capture_num_tokens"}
"""The attribute of a graph runner that holds the sizes it captured."""
SHIFT_MODES = tuple(mode for mode in MODES if mode is not Mode.TP)
"""The modes that we capture graphs for. SGLang captures the graphs of TP."""


@dataclass
class GraphSet:
    """The graphs of one phase in one mode.

    Attributes:
        sizes: The captured sizes.
        runner: The graph runner. It is None if steps run eagerly, and for TP, because SGLang keeps TP's runner.
        gib: Device memory of the graphs, in GiB; None for TP, because SGLang reports it.
        seconds: How long the capture took; None for TP.
        replay_steps: Number of steps that replayed a graph.
        eager_steps: Number of steps that found no graph and ran eagerly.
    """

    sizes: tuple[int, ...] = ()
    runner: Any = None
    gib: float | None = None
    seconds: float | None = None
    replay_steps: int = 0
    eager_steps: int = 0

    def report(self) -> dict[str, Any]:
        """The set as a JSON value, for ``/server_info``."""
        value: dict[str, Any] = {"sizes": list(self.sizes), "replayed": self.replay_steps, "missed": self.eager_steps}
        if self.gib is not None and self.seconds is not None:
            value |= {"gib": round(self.gib, 3), "seconds": round(self.seconds, 2)}
        return value

    def __str__(self) -> str:
        text = f"{len(self.sizes)} sizes, {self.sizes[0]} to {self.sizes[-1]}" if self.sizes else "none"
        return text if self.gib is None else f"{text}, {self.gib:.2f} GiB, {self.seconds:.1f} s"


def _no_graphs() -> dict[Mode, GraphSet]:
    return {mode: GraphSet() if mode is Mode.TP else GraphSet(gib=0.0, seconds=0.0) for mode in MODES}


@dataclass
class PhaseGraphs:
    """The graphs of one phase.

    Attributes:
        plan: The sizes that the plan captures.
        factor: A step may be padded to at most ``factor`` times its tokens.
        sets: The captured graphs, by mode.
    """

    plan: GraphPlan = field(default_factory=GraphPlan)
    factor: float = math.inf
    sets: dict[Mode, GraphSet] = field(default_factory=_no_graphs)

    def padded(self, tokens: int, width: int = 1) -> dict[Mode, int]:
        """By mode, ``tokens`` padded to the size of the graph that a step would replay.

        For TP this is the next of SGLang's sizes, whether or not TP has a graph of that size.

        Args:
            tokens: Tokens of the step.
            width: Tokens of each request of a decode step.
        """
        sizes = {mode: graph_set.sizes for mode, graph_set in self.sets.items()} | {Mode.TP: self.plan.sglang_sizes}
        return {mode: width * padded(tokens // width, of_mode, self.factor) for mode, of_mode in sizes.items()}

    def count(self, mode: Mode, replayed: bool) -> bool | None:
        """Count a step. Return ``replayed``, or None if the phase has no graphs.

        Args:
            mode: The mode of the step.
            replayed: Whether the step replayed a graph; False if it ran eagerly.
        """
        if not any(graph_set.sizes for graph_set in self.sets.values()):
            return None
        if replayed:
            self.sets[mode].replay_steps += 1
        else:
            self.sets[mode].eager_steps += 1
        return replayed

    def report(self) -> dict[str, Any]:
        """The sets by mode as a JSON value, for ``/server_info``."""
        return {mode.value: graph_set.report() for mode, graph_set in self.sets.items()}


class ModeGraphs:
    """The CUDA graphs of one model runner in every mode.

    SGLang captures the graphs of TP, and its model runner holds their graph runners. After that, subclasses of these
    graph runners capture the graphs of the other modes, in the same memory pool. While a step runs in such a mode,
    the model runner holds the graph runners of that mode instead.

    Args:
        runner: A :class:`sglang_shift.runtime.model_runner.ShiftModelRunner` that has its attention backend.
        config: It has the policy, S, and the largest number of graphs in SP.
    """

    @relies_on(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner.can_replay_locally",
        "This method decides how far SGLang may pad a prefill.",
    )
    def __init__(self, runner: Any, config: ShiftConfig) -> None:
        self.runner = runner
        exact = get_exec().graph.disable_cuda_graph_padding
        factors = {Phase.DECODE: 1.0 if exact else math.inf, Phase.PREFILL: _MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR}
        sizes_by_phase = sglang_sizes_by_phase(runner)
        plans = {
            phase: plan_graphs(
                sizes,
                config,
                exact,
                factors[phase],
                width=runner.decode_num_tokens_per_req() if phase == Phase.DECODE else 1,
                steps_need_tp=bool(get_lora().enable_lora),
            )
            for phase, sizes in sizes_by_phase.items()
        }
        if get_observability().forward_hooks:
            # SGLang registers the hooks after its own capture, so its graphs do not have them. A later capture would.
            none: dict[Mode, tuple[int, ...]] = dict.fromkeys(SHIFT_MODES, ())
            plans = {phase: replace(plan, sizes=plan.sizes | none) for phase, plan in plans.items()}
        self.phases = {phase: PhaseGraphs(plan, factors[phase]) for phase, plan in plans.items()}

    def for_phase(self, prefill: bool) -> PhaseGraphs:
        """The graphs for prefill steps, or for decode steps. A step with prompt tokens is a prefill step."""
        return self.phases[Phase.PREFILL if prefill else Phase.DECODE]

    def capture(self, capture_tp: Callable[[], None], phases: tuple[str, ...] = Phase.ALL) -> None:
        """Capture the sets of all modes, with the sizes of the plan.

        Args:
            capture_tp: SGLang's own capture of all ``phases``.
            phases: The phases to capture.
        """
        if not any(self.phases[phase].plan.sglang_sizes for phase in phases):
            capture_tp()
            return
        runner, plans = self.runner, {phase: self.phases[phase].plan for phase in phases}
        for phase in phases:
            for mode in SHIFT_MODES:
                self.phases[phase].sets[mode].runner = None  # the new capture needs the memory of the old graphs
        # All sets share one buffer for logits. It must fit the largest graph of any set.
        with limit_sizes({phase: tuple(chain(*plan.sizes.values())) for phase, plan in plans.items()}):
            logits = runner.graph_shared_output = GraphSharedOutput.create_for_model_runner(runner)
        with limit_sizes({phase: plan.sizes[Mode.TP] for phase, plan in plans.items()}):
            capture_tp()
        runner.graph_shared_output = logits
        for mode in SHIFT_MODES:
            with limit_sizes({phase: plan.sizes[mode] for phase, plan in plans.items()}), capturing(runner, mode):
                for phase in reversed(phases):  # SGLang, too, captures prefills first
                    self._capture(phase, mode)
        for phase in phases:
            self._record_sizes(phase)

    @relies_on(
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:capture_decode_graph",
        "This function builds the runner of _decode_cuda_graph_runner_cls, and measures its memory and time.",
    )
    @relies_on(
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:capture_prefill_graph",
        "This function builds a PrefillCudaGraphRunner, and measures its memory and time.",
    )
    def _capture(self, phase: str, mode: Mode) -> None:
        graphs, runner = self.phases[phase], self.runner
        if not graphs.plan.sizes[mode]:
            return
        logger.info("sglang_shift: capturing the CUDA graphs of %s (%s)", mode.name, phase)
        if phase == Phase.PREFILL:
            captured = capture_prefill_graph(model_runner=runner, eager_runner=runner.eager_runner)
        else:
            captured = capture_decode_graph(model_runner=runner)
        # If SGLang captures no graphs of this phase, it returns None or its eager runner.
        graph_set = graphs.sets[mode]
        graph_set.runner = captured.runner if hasattr(captured.runner, SIZES[phase]) else None
        graph_set.gib, graph_set.seconds = captured.memory_usage_gb, captured.capture_time
        runner.graph_memory_usage = merge_graph_memory_usage(runner.graph_memory_usage, captured.memory_usage)
        runner.graph_time_usage = merge_graph_time_usage(runner.graph_time_usage, captured.time_usage)

    def _record_sizes(self, phase: str) -> None:
        sets = self.phases[phase].sets
        for mode, graph_set in sets.items():
            runner = getattr(self.runner, RUNNERS[phase]) if mode is Mode.TP else graph_set.runner
            graph_set.sizes = tuple(getattr(runner, SIZES[phase], ()))
        text = "; ".join(f"{mode.name} {graph_set}" for mode, graph_set in sets.items())
        logger.info("sglang_shift: CUDA graphs (%s): %s", phase, text)

    @contextmanager
    def install(self, mode: Mode) -> Iterator[None]:
        """Inside of this context, the model runner has the graphs of ``mode``, and no others."""
        if mode is Mode.TP:
            yield
            return
        tp = {name: getattr(self.runner, name) for name in RUNNERS.values()}
        for phase, name in RUNNERS.items():
            setattr(self.runner, name, self.phases[phase].sets[mode].runner)
        try:
            yield
        finally:
            for name, runner in tp.items():
                setattr(self.runner, name, runner)

    @contextmanager
    def without(self) -> Iterator[None]:
        """Inside of this context, every step runs eagerly, whatever its mode."""
        tp = {name: getattr(self.runner, name) for name in RUNNERS.values()}
        sets = [graph_set for graphs in self.phases.values() for graph_set in graphs.sets.values()]
        runners = [graph_set.runner for graph_set in sets]
        for name in tp:
            setattr(self.runner, name, None)
        for graph_set in sets:
            graph_set.runner = None
        try:
            yield
        finally:
            for name, runner in tp.items():
                setattr(self.runner, name, runner)
            for graph_set, runner in zip(sets, runners, strict=True):
                graph_set.runner = runner

    def captured_sizes(self) -> dict[str, dict[str, list[int]]]:
        """The captured sizes, by phase and mode; empty if there are none at all."""
        captured_sizes = {
            phase: {mode.value: list(graph_set.sizes) for mode, graph_set in graphs.sets.items()}
            for phase, graphs in self.phases.items()
        }
        return captured_sizes if any(any(by_mode.values()) for by_mode in captured_sizes.values()) else {}

    def report(self) -> dict[str, Any]:
        """The sets by phase and mode as a JSON value, for ``/server_info``."""
        return {phase: graphs.report() for phase, graphs in self.phases.items()}


@relies_on(
    "sglang.srt.model_executor.runner.base_cuda_graph_runner:get_batch_sizes_to_capture",
    "SGLang captures the batch sizes that this function returns.",
)
def sglang_sizes_by_phase(runner: Any) -> dict[str, list[int]]:
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
        # The dummy batch of capture_prefill_graph cannot have more tokens than this.
        most = runner.req_to_token_pool.size * runner.model_config.context_len
        sglang_sizes = get_exec().graph.cuda_graph_config.prefill.bs or []
        sizes[Phase.PREFILL] = sorted(size for size in sglang_sizes if size <= most)
    return sizes


@contextmanager
def limit_sizes(sizes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Inside of this context, SGLang captures only these sizes, by phase. Without sizes, it captures nothing."""
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
def capturing(runner: Any, mode: Mode) -> Iterator[None]:
    """Inside of this context, SGLang builds graph runners of ``mode`` for ``runner``.

    These graphs have no LoRA adapters. With SGLang's LoRA manager, a graph runner would also make new buffers for the
    adapters, and the graphs of TP would go on to read the old ones.
    """
    runner.capture_mode, adapters, runner.lora_manager = mode, runner.lora_manager, None
    try:
        yield
    finally:
        runner.capture_mode, runner.lora_manager = Mode.TP, adapters
