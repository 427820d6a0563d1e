"""Runs SGLang's own graph runners on a CPU. A capture records the callable, and a replay runs it again.

Only the graph itself is replaced. These parts are real:

- the model runner, and its choice between graphs and eager
- both graph runners with their buckets, static buffers, padding and keys
- the parts of the breakable backend that handle outputs
- the ranks' groups (gloo)

A CUDA graph runs no Python. So a replay undoes what Python did meanwhile.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing as mp
from sglang.srt.arg_groups.choices import add_attention_backend_choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.dp_attention import DpPaddingMode
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
from sglang.srt.model_executor.runner import decode_cuda_graph_runner, prefill_cuda_graph_runner
from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.platforms.interface import PlatformCapabilities
from sglang.srt.runtime_context import get_forward
from sglang_shift.parallel import step as step_module
from sglang_shift.platforms.cpu import ShiftCpuPlatform
from sglang_shift.tools.servers import free_port


@contextmanager
def no_python() -> Iterator[None]:
    """Undo what the body does to the state that Python keeps. The body may begin a step, as the capture did."""
    flags, active, token = get_forward(), get_forward().sp_active, step_module._current.set(None)
    try:
        yield
    finally:
        step_module._current.reset(token)
        flags.set("sp_active", active)


def overwrite(static: Any, new: Any) -> None:
    """Write the new results where the capture wrote its results, as a replay does."""
    for name in ("next_token_logits", "hidden_states"):
        if (old := getattr(static, name)) is not None:
            old.copy_(getattr(new, name))


class RecordedDecode(FullCudaGraphBackend):
    """Keeps one callable for each shape. The callable reads the runner's static buffers, as a graph does."""

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> None:
        for _ in range(2):
            forward_fn()
        self._graphs[shape_key], self._outputs[shape_key] = forward_fn, forward_fn()

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> LogitsProcessorOutput:
        with no_python():
            overwrite(self._outputs[shape_key], self._graphs[shape_key]())
        return self._outputs[shape_key]


class RecordedPrefill(BreakableCudaGraphBackend):
    """Runs the layers again on the static buffers. Attention is a break in the graph and works on the live batch."""

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        self._shared_output_buffer, self._forward = None, self._cuda_graph_runner.layer_model.forward
        with self.replay_session():
            yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> None:
        for _ in range(2):
            output = forward_fn()
        if self._shared_output_buffer is None:
            rows = self._cuda_graph_runner.cuda_graph_output_capacity_rows(output) or shape_key.size
            self._shared_output_buffer = self._alloc_full_buffer(output, rows)
        rows = self._output_rows(forward_fn(), shape_key.size)
        self._graphs[shape_key] = rows
        self._outputs[shape_key] = self._slice_output(self._shared_output_buffer, rows)

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> torch.Tensor:
        runner, rows = self._cuda_graph_runner, self._graphs[shape_key]
        assert len(static_forward_batch.input_ids) == shape_key.size
        static_forward_batch.dp_padding_mode = DpPaddingMode.get_default_mode_in_cuda_graph()  # as in a capture
        patched, runner.layer_model.forward = runner.layer_model.forward, self._forward
        try:
            with no_python():
                output = runner._run_forward(static_forward_batch, shape_key.size)
        finally:
            runner.layer_model.forward = patched
        self._copy_output_to_buffer(output, self._outputs[shape_key], rows)
        return self._outputs[shape_key]


class RecordedAttention(TorchNativeAttnBackend):
    """torch-native attention, with the methods of a backend that graph runners call."""

    name = "recorded"  # SGLang turns graphs off for the name of torch-native attention

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.graph_state = max_bs, max_num_tokens

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        """Extend each request by its draft tokens in a verify step. The draft tokens are a chain here."""
        if forward_batch.forward_mode.is_target_verify():
            width = forward_batch.spec_info.draft_token_num
            prefix, forward_batch = forward_batch.seq_lens, copy.copy(forward_batch)
            forward_batch.extend_prefix_lens, forward_batch.seq_lens = prefix, prefix + width
            forward_batch.extend_seq_lens = torch.full_like(prefix, width)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)


def record_graphs() -> None:
    """Let SGLang capture on this process's CPU. One call is enough, and it cannot be undone."""

    @contextmanager
    def on_no_stream(stream: Any = None) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(stream=stream)

    torch.cpu.is_current_stream_capturing = lambda: False  # type: ignore[attr-defined]
    ShiftCpuPlatform.capabilities = PlatformCapabilities(graph_capture=True)
    ShiftCpuPlatform.get_graph_runner_cls = lambda self: lambda runner: runner._decode_cuda_graph_runner_cls()(runner)  # type: ignore[method-assign,return-value]
    # On a GPU, SGLang asks whether graphs are disabled. On a CPU, it asks for torch.compile instead.
    cuda_graph_setup.get_flags = lambda: SimpleNamespace(  # type: ignore[assignment]
        capture=SimpleNamespace(enable_torch_compile=not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED))
    )
    ForwardMode.is_cpu_graph = ForwardMode.is_cuda_graph  # type: ignore[method-assign]
    decode_cuda_graph_runner.resolve_decode_backend = RecordedDecode  # type: ignore[assignment]
    prefill_cuda_graph_runner.resolve_prefill_backend = RecordedPrefill  # type: ignore[assignment]
    for module in (decode_cuda_graph_runner, prefill_cuda_graph_runner):
        module.graph_capture = on_no_stream  # type: ignore[assignment]
    add_attention_backend_choices([RecordedAttention.name])
    ATTENTION_BACKENDS[RecordedAttention.name] = RecordedAttention


def run_model_ranks(size: int, function: Callable[..., None], flags: list[str], *args: Any) -> None:
    """Run ``function(runner, *args)`` in ``size`` forked ranks, each with a real model runner and its graphs."""
    mp.start_processes(
        _rank_main, (size, free_port(), function, flags, args), nprocs=size, start_method="fork"
    )  # fmt: skip


def _rank_main(rank: int, size: int, port: int, function: Callable[..., None], flags: list[str], args: Any) -> None:
    runner = model_runner(rank, port, ["--tp-size", str(size), "--dtype", "float32", *flags])
    function(runner, *args)
    # SGLang's threads and groups would wait for a scheduler's shutdown.
    os._exit(0)


def model_runner(rank: int, port: int, flags: list[str]) -> Any:
    """Build a rank's model runner, as a scheduler's worker does."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.runtime_context import SpawnRanks, get_schedule, publish, spawn_world_rank
    from sglang_shift import seams
    from sglang_shift.args.server_args import prepare_server_args
    from sglang_shift.launch_server import resolve
    from sglang_shift.runtime.model_runner import ShiftModelRunner

    record_graphs()
    server_args = prepare_server_args(flags)
    resolve(server_args)
    server_args.check_server_args()  # it also reads the paths of LoRA adapters
    world_rank = spawn_world_rank(server_args, tp_rank=rank, pp_rank=0)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, gpu_id=rank))
    seams.install()
    torch.set_num_threads(1)
    model_config = ModelConfig.from_server_args(server_args)
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = ShiftModelRunner(
        model_config=model_config,
        mem_fraction_static=get_schedule().mem_fraction_static,
        gpu_id=rank,
        nccl_port=port,
        server_args=server_args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


@contextmanager
def recorded_steps(runner: Any) -> Iterator[tuple[list[torch.Tensor], list[bool]]]:
    """Record the steps of a block: the logits of each step, and whether it replayed a graph."""
    logits: list[torch.Tensor] = []
    replayed: list[bool] = []
    forward = type(runner).forward

    def recording(batch, *args, **kwargs):
        output = forward(runner, batch, *args, **kwargs)
        replayed.append(output.can_run_graph)
        logits.append(output.logits_output.next_token_logits.clone())
        return output

    runner.forward = recording
    yield logits, replayed
    del runner.forward
