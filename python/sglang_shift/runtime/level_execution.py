"""What the steps of a rank at one level run with, besides the model: attention backends and CUDA graphs.

An attention backend keeps numbers of heads, and a graph keeps addresses and groups. So each level has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang_shift.config import ShiftConfig
from sglang_shift.graphs.mode_graphs import RUNNERS, sglang_sizes_by_phase
from sglang_shift.modes import Mode
from sglang_shift.parallel.level import Level
from sglang_shift.runtime.model_runner import ShiftModelRunner
from sglang_shift.seams import relies_on

BACKENDS = ("attn_backend", "decode_attn_backend", "decode_attn_backend_group")
"""The attributes of a model runner with its attention backends."""

GRAPHS = (
    "graphs", *RUNNERS.values(), "eager_runner", "graph_shared_output", "decode_cuda_graph_captured",
    "decode_cuda_graph_capture_bs",
)  # fmt: skip
"""The attributes of a model runner with its graphs, and with what was made for them."""


@dataclass(frozen=True)
class Execution:
    """The attention backends and the graphs of a level, as attributes of the model runner."""

    attributes: dict[str, Any]

    @classmethod
    @relies_on(
        "sglang.srt.model_executor.model_runner:ModelRunner.init_attention_backends",
        "This method builds the attention backends for the sizes of the parallel context, and sets BACKENDS.",
    )
    @relies_on(
        "sglang.srt.model_executor.model_runner:ModelRunner.init_cuda_graphs",
        "This method captures the graphs of the runner's model, and sets GRAPHS.",
    )
    def build(cls, runner: ShiftModelRunner, config: ShiftConfig) -> Execution:
        """Build them for the level that the rank is at, with a KV cache that holds nothing. Collective.

        Args:
            runner: The model runner, at the level.
            config: The settings of the level (:func:`settings_at`).
        """
        runner.init_attention_backends()
        runner.capture_graphs(config)
        return cls.of(runner)

    @classmethod
    def of(cls, runner: ShiftModelRunner) -> Execution:
        """What the runner has now."""
        return cls({name: getattr(runner, name) for name in (*BACKENDS, *GRAPHS)})

    def install(self, runner: ShiftModelRunner) -> None:
        """Let the next step of the runner run with them."""
        for name, value in self.attributes.items():
            setattr(runner, name, value)


def settings_at(config: ShiftConfig, place: Level, tp_only: bool) -> ShiftConfig:
    """The settings of one instance, which decide what graphs a level needs.

    Args:
        config: The settings of the world.
        place: The place of a rank at the level.
        tp_only: Whether the ranks lack the weights of SP steps.
    """
    settings = replace(config, world_size=place.size, sp_size=place.topology.layout.sp_size)
    return settings if place.has_sp and not tp_only else replace(settings, policy=Mode.TP.value)


def captures_graphs(runner: ShiftModelRunner) -> bool:
    """Whether SGLang captures graphs on this device, with these settings."""
    return any(sglang_sizes_by_phase(runner).values())
