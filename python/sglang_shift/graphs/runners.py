"""SGLang's CUDA graph runners, captured and replayed in SP.

They differ from SGLang's in what a replay cannot redo, because it runs no Python: the region's state
is right while the graph is captured, and set again for what runs after a replay; exchanges are counted
once, and added at each replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner_components.attention_backend_setup import build_attention_backends
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

from sglang_shift.modes import Mode
from sglang_shift.parallel.region import region
from sglang_shift.seams import overrides, substitutes_for


class Exchanges:
    """What the exchanges of each captured forward send, by the graph's size."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[int, int]] = {}

    @contextmanager
    def recording(self, size: int) -> Iterator[None]:
        """The body is a forward of ``size``, as the graph will replay it."""
        exchange = region.groups.exchange
        calls, sent = exchange.calls, exchange.bytes_sent
        yield
        self._sent[size] = exchange.calls - calls, exchange.bytes_sent - sent

    def replayed(self, size: int) -> None:
        """Count those of one replay."""
        calls, sent = self._sent[size]
        region.groups.exchange.calls += calls
        region.groups.exchange.bytes_sent += sent


class SpDecodeGraphRunner(DecodeCudaGraphRunner):
    """Decode graphs in SP: the whole forward, from the token ids to the logits."""

    def __init__(self, model_runner: Any) -> None:
        self.exchanges = Exchanges()
        # What an attention backend keeps for a graph, it keeps by batch size: TP's graphs need theirs.
        shared = model_runner.decode_cuda_graph_runner is None
        super().__init__(model_runner, attn_backend=None if shared else new_attention_backend(model_runner))

    @overrides("the groups of the base configuration communicate in a graph")
    def _capture_one_stream(self, *args: Any, **kwargs: Any) -> None:
        with region.groups.graph_capture(self.stream), region.groups.exchange.uncounted():
            super()._capture_one_stream(*args, **kwargs)

    @overrides("captures the forward in SP")
    def capture_one_shape(self, size: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As SGLang's, each forward of it in SP: it is run twice before it is captured."""

        @functools.wraps(forward)
        def in_sp(input_ids: torch.Tensor, positions: torch.Tensor, batch: ForwardBatch, **more: Any) -> Any:
            with region.step(Mode.SP, batch), self.exchanges.recording(size):
                return forward(input_ids, positions, batch, **more)

        super().capture_one_shape(size, in_sp, *args, **kwargs)

    @overrides("counts the exchanges of a replay")
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's; the exchanges count."""
        output = super().execute(*args, **kwargs)
        self.exchanges.replayed(self.bs)
        return output


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

    def __init__(self, model_runner: Any) -> None:
        self.exchanges = Exchanges()
        super().__init__(model_runner)

    @overrides("the groups of the base configuration communicate in a graph")
    def _capture_one_stream(self) -> None:
        with region.groups.graph_capture(self.stream), region.groups.exchange.uncounted():
            super()._capture_one_stream()

    @overrides("captures the layers in SP")
    def _run_forward(self, forward_batch: ForwardBatch, num_tokens: int) -> Any:
        # The exit is no part of the graph: a replay would copy the rows of the capture's batch for it.
        with region.step(Mode.SP, forward_batch, exits=False), self.exchanges.recording(num_tokens):
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
        region.enter(static_num_tokens, static_forward_batch.input_ids.device)
        self.exchanges.replayed(static_num_tokens)
        return super()._execute_body_capture(forward_batch, static_forward_batch, static_num_tokens, *args, **kwargs)


def new_attention_backend(model_runner: Any) -> Any:
    """Another attention backend like the runner's; a workspace that serves one kernel at a time is shared."""
    backend = build_attention_backends(model_runner=model_runner).attn_backend
    model_runner.kv_index_translator.bind_and_verify_backends([backend])
    return backend
