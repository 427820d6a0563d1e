"""SGLang's CUDA graph runners, captured and replayed in SP.

They differ from SGLang's in what a replay cannot redo, because it runs no Python: each capture is a step
of its own, and what runs after a replay finds in its step what the graph's Python would have put there.
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
from sglang_shift.parallel.step import Step, current, running
from sglang_shift.seams import overrides, substitutes_for


class SpDecodeGraphRunner(DecodeCudaGraphRunner):
    """Decode graphs in SP: the whole forward, from the token ids to the logits."""

    def __init__(self, model_runner: Any) -> None:
        # What an attention backend keeps for a graph, it keeps by batch size: TP's graphs need theirs.
        shared = model_runner.decode_cuda_graph_runner is None
        super().__init__(model_runner, attn_backend=None if shared else new_attention_backend(model_runner))

    @overrides("the groups of the base configuration communicate in a graph")
    def _capture_one_stream(self, *args: Any, **kwargs: Any) -> None:
        with self.model_runner.topology.graph_capture(self.stream):
            super()._capture_one_stream(*args, **kwargs)

    @overrides("captures the forward in SP")
    def capture_one_shape(self, size: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As SGLang's, each forward of it in SP: it is run twice before it is captured."""

        @functools.wraps(forward)
        def in_sp(input_ids: torch.Tensor, positions: torch.Tensor, batch: ForwardBatch, **more: Any) -> Any:
            with running(Step(Mode.SP, self.model_runner.topology, batch)):
                return forward(input_ids, positions, batch, **more)

        super().capture_one_shape(size, in_sp, *args, **kwargs)


def captures_sp(model_runner: Any) -> bool:
    """Whether the graph runners that SGLang builds for ``model_runner`` are those of SP."""
    return getattr(model_runner, "capture_mode", Mode.TP) is Mode.SP


@substitutes_for(
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner",
    "SGLang builds its prefill graph runner by this name",
    when=captures_sp,
)
class SpPrefillGraphRunner(PrefillCudaGraphRunner):
    """Prefill graphs in SP: the layers only. The exit from the region and the LM head follow each replay."""

    @overrides("the groups of the base configuration communicate in a graph")
    def _capture_one_stream(self) -> None:
        with self.model_runner.topology.graph_capture(self.stream):
            super()._capture_one_stream()

    @overrides("captures the layers in SP")
    def _run_forward(self, forward_batch: ForwardBatch, num_tokens: int) -> Any:
        # The exit is no part of the graph: a replay would copy the rows of the capture's batch for it.
        with running(Step(Mode.SP, self.model_runner.topology, forward_batch, exits=False)):
            return super()._run_forward(forward_batch, num_tokens)

    @overrides("a rank has fewer rows than the step has tokens")
    def cuda_graph_output_capacity_rows(self, output: torch.Tensor) -> int:
        """A rank's rows, ``[ceil(T / S), h]``, are all that comes out; the largest graph is the first."""
        return output.shape[0]

    @overrides("tells the exit from the region how many tokens the graph has")
    def _execute_body_capture(
        self, forward_batch: ForwardBatch, static_forward_batch: ForwardBatch, static_num_tokens: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        step = current()
        assert step is not None
        enter(step, static_num_tokens, static_forward_batch.input_ids.device)
        return super()._execute_body_capture(forward_batch, static_forward_batch, static_num_tokens, *args, **kwargs)


def new_attention_backend(model_runner: Any) -> Any:
    """Another attention backend like the runner's; a workspace that serves one kernel at a time is shared."""
    backend = build_attention_backends(model_runner=model_runner).attn_backend
    model_runner.kv_index_translator.bind_and_verify_backends([backend])
    return backend
