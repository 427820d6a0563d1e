"""Defines subclasses of SGLang's CUDA graph runners that capture and replay in SP.

A replay runs no Python. So a capture is a step of its own, with its own context. After a replay, code that runs
without a graph needs values in the step that the graph's Python would have set. These runners set them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import build_attention_backends
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

from sglang_shift.modes import Mode
from sglang_shift.parallel.region import enter
from sglang_shift.parallel.step import current, run_step
from sglang_shift.seams import overrides, substitutes_for


class SpDecodeGraphRunner(DecodeCudaGraphRunner):
    """Decode graphs in SP. A graph has the whole forward, from the token ids to the logits."""

    def __init__(self, model_runner: Any) -> None:
        # An attention backend keeps the buffers of a graph by batch size. If TP has graphs, too, this runner needs its
        # own backend, or it would overwrite the buffers of TP's graphs.
        shared = model_runner.decode_cuda_graph_runner is None
        super().__init__(model_runner, attn_backend=None if shared else new_attention_backend(model_runner))

    @overrides("Our method lets the groups of the base configuration communicate in a graph.")
    def _capture_one_stream(self, *args: Any, **kwargs: Any) -> None:
        with self.model_runner.topology.graph_capture(self.stream):
            super()._capture_one_stream(*args, **kwargs)

    @overrides("Our method captures the forward in SP.")
    def capture_one_shape(self, size: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Capture one size. Each forward in it is a step in SP, also the two forwards that SGLang runs to warm up."""

        @functools.wraps(forward)
        def in_sp(input_ids: torch.Tensor, positions: torch.Tensor, batch: ForwardBatch, **more: Any) -> Any:
            with run_step(self.model_runner.step(Mode.SP, batch)):
                return forward(input_ids, positions, batch, **more)

        super().capture_one_shape(size, in_sp, *args, **kwargs)


def captures_sp(model_runner: Any = None) -> bool:
    """Whether SGLang builds graph runners of SP for ``model_runner`` now."""
    return getattr(model_runner, "capture_mode", Mode.TP) is Mode.SP


@substitutes_for(
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner",
    "SGLang makes its prefill graph runner from the class of this name.",
    when=captures_sp,
    exclusive=True,
)
class SpPrefillGraphRunner(PrefillCudaGraphRunner):
    """Prefill graphs in SP. A graph has only the layers. Exit from the region and LM head run after a replay."""

    @overrides("Our method lets the groups of the base configuration communicate in a graph.")
    def _capture_one_stream(self) -> None:
        with self.model_runner.topology.graph_capture(self.stream):
            super()._capture_one_stream()

    @overrides("Our method captures the layers in SP.")
    def _run_forward(self, forward_batch: ForwardBatch, num_tokens: int) -> Any:
        # The exit is not part of the graph. A replay would use the rows of the batch that was captured.
        with run_step(self.model_runner.step(Mode.SP, forward_batch, has_exit=False)):
            return super()._run_forward(forward_batch, num_tokens)

    @overrides("In SP, a rank has fewer rows than the step has tokens.")
    def cuda_graph_output_capacity_rows(self, output: torch.Tensor) -> int:
        """The rows of the output, ``[ceil(T / S), h]``.

        SGLang allocates the output at its first capture. The first capture is the largest graph, so all graphs fit.
        """
        return output.shape[0]

    @overrides("Our method tells the exit from the region how many tokens the graph has.")
    def _execute_body_capture(
        self, forward_batch: ForwardBatch, static_forward_batch: ForwardBatch, static_num_tokens: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        step = current()
        assert step is not None
        enter(step, static_num_tokens, static_forward_batch.input_ids.device)
        return super()._execute_body_capture(forward_batch, static_forward_batch, static_num_tokens, *args, **kwargs)


def new_attention_backend(model_runner: Any) -> Any:
    """Build another attention backend like the runner's. Both share a workspace if it serves one kernel at a time."""
    backend = build_attention_backends(model_runner=model_runner).attn_backend
    model_runner.kv_index_translator.bind_and_verify_backends([backend])
    return backend
