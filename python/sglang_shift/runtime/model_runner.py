"""The model runner: base weights after loading, CUDA graphs of both modes, each forward in its step's mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.model_executor.cuda_graph_config import Phase
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_exec, get_flags, get_parallel, get_schedule
from sglang.srt.utils import get_available_gpu_memory
from sglang_shift_kernels.operations import Shape, warm_up

from sglang_shift.config import ShiftConfig
from sglang_shift.graphs.mode_graphs import ModeGraphs
from sglang_shift.graphs.runners import SpDecodeGraphRunner
from sglang_shift.models.fields import check_class
from sglang_shift.modes import Mode
from sglang_shift.parallel import topology
from sglang_shift.parallel.exchange.choose import Operands, make_exchange
from sglang_shift.parallel.exchange.collective import SequenceExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.region import region
from sglang_shift.resolution import shift_config_of
from sglang_shift.weights.base_weights import BaseWeights, WeightReport
from sglang_shift.weights.projections import OutputProjection, QkvProjection

logger = logging.getLogger(__name__)


class ShiftModelRunner(ModelRunner):
    """SGLang's model runner with a base configuration beside full TP."""

    # Forwards outside of `running_in` (warm-up, autotuning) are TP.
    step_mode: Mode = Mode.TP
    capture_mode: Mode = Mode.TP
    graphs: ModeGraphs
    weight_report: WeightReport
    weight_updater: WeightUpdater
    decode_cuda_graph_runner: Any
    prefill_cuda_graph_runner: Any
    weight_load_mem_usage: float

    def load_model(self) -> None:
        """Load the stock full-TP shards, then assemble the base weights around them."""
        config = shift_config_of(self.server_args)
        assert config is not None
        # Layers built from here on get SGLang's sequence-parallel batch variant.
        get_flags().sp.enabled = True
        groups = region.parallel = topology.build(RankLayout(config.world_size, config.sp_size))
        super().load_model()
        check_class(self.model, self.model_config.hf_config.architectures[0])
        before = self._free_gib() + self.weight_load_mem_usage
        backup = get_exec().features.enable_weights_cpu_backup
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=backup):
            self.base_weights = BaseWeights(self.model, groups)
        self.weight_report = self.base_weights.report()
        # What /server_info reports as the memory of the weights, in GiB: before the exchange takes its own.
        self.weight_load_mem_usage = before - self._free_gib()
        groups.exchange = self._exchange(config)
        if self.device != "cpu":  # gloo keeps nothing that counts
            self._warm_up_collectives()
        logger.info(
            "sglang_shift: SP=%d x TP=%d base configuration assembled from %d projections; "
            "weights %d bytes on this rank, %d bytes beyond the base configuration's%s; exchange: %s",
            config.sp_size,
            groups.layout.base_tp_size,
            len(self.base_weights.projections),
            self.weight_report.total,
            self.weight_report.beyond_base,
            " (replicated KV heads)" if self.weight_report.beyond_base else "",
            groups.exchange.text,
        )

    def _free_gib(self) -> float:
        return get_available_gpu_memory(self.device, self.gpu_id)

    def _exchange(self, config: ShiftConfig) -> SequenceExchange:
        """The exchange for this model's projections and the largest step; its kernels are compiled."""
        projections, width = self.base_weights.projections, qkv_width(self.base_weights)
        operands = Operands(most_tokens(), width, self.dtype)
        exchange = make_exchange(config, region.groups.sp_group, self.device, get_parallel().nnodes, operands)
        if self.device == "cuda":
            # Graphs of SP have multiples of S tokens: the first other step would compile while it serves.
            hidden, out = next(p.base.weight.shape for p in projections if isinstance(p, OutputProjection))
            shape = Shape(config.sp_size, 2, width // config.sp_size, out // config.sp_size)
            warm_up(shape, hidden, self.dtype, self.device, exchange.fp8)
        return exchange

    def _warm_up_collectives(self) -> None:
        """Have NCCL take the memory that SP steps make it take, before the KV pool gets what is left."""
        hidden = next(p.base.weight.shape[0] for p in self.base_weights.projections if isinstance(p, OutputProjection))
        region.groups.warm_up(most_tokens(), hidden, qkv_width(self.base_weights), self.dtype, self.device)
        current_platform.synchronize()
        current_platform.empty_cache()  # what was sent

    def init_weight_updater(self) -> None:
        """Have the base weights follow every weight update that SGLang makes."""
        super().init_weight_updater()
        stock = self.weight_updater
        self.weight_updater = ShiftWeightUpdater(**{f.name: getattr(stock, f.name) for f in fields(stock)})

    def check_weights(self, action: str, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's weight checker, which may write this rank's shards, too."""
        if action == "reset_tensors":
            self.base_weights.stale = True
        return super().check_weights(action, *args, **kwargs)

    def init_cuda_graphs(self, *args: Any, **kwargs: Any) -> None:
        """Capture SGLang's graphs and SP's."""
        config = shift_config_of(self.server_args)
        assert config is not None
        self.graphs = ModeGraphs(self, config)
        self.graphs.capture(partial(super().init_cuda_graphs, *args, **kwargs))

    def init_decode_cuda_graph(self) -> None:
        """Capture those of decode steps again, in both modes, where a weight update asks for it."""
        self.graphs.capture(super().init_decode_cuda_graph, (Phase.DECODE,))

    def _decode_cuda_graph_runner_cls(self) -> type:
        return SpDecodeGraphRunner if self.capture_mode is Mode.SP else super()._decode_cuda_graph_runner_cls()

    @contextmanager
    def running_in(self, mode: Mode) -> Iterator[None]:
        """Forwards inside run in ``mode``, and replay its graphs."""
        self.step_mode = mode
        try:
            with self.graphs.used(mode):
                yield
        finally:
            self.step_mode = Mode.TP

    def _forward_raw(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> ModelRunnerOutput:
        if self.step_mode is Mode.SP and self.base_weights.stale:
            self.base_weights.refresh()  # here, as this is on the forward's stream
        span = torch.profiler.record_function(f"sglang_shift {self.step_mode.value} step")
        with span, region.step(self.step_mode, forward_batch):
            return super()._forward_raw(forward_batch, *args, **kwargs)


def most_tokens() -> int:
    """Of a step: a chunk, or what SGLang takes into one step where it does not chunk prefills."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size or 0
    return int(chunk if chunk > 0 else schedule.max_prefill_tokens)


def qkv_width(weights: BaseWeights) -> int:
    """``S * D`` of the widest exchange."""
    return max(p.base.weight.shape[0] for p in weights.projections if isinstance(p, QkvProjection))


class ShiftWeightUpdater(WeightUpdater):
    """SGLang writes this rank's TP shards; the other ranks' parts of its base weights follow before the next SP step.

    Noted as SGLang begins, on all ranks alike, whether it then succeeds or not.
    """

    __slots__ = ()

    def update_weights_from_disk(
        self, model_path: str, load_format: str, *args: Any, **kwargs: Any
    ) -> tuple[bool, str]:
        """As SGLang's (which rolls back after a failure); an unknown format is an error, not the end of the rank."""
        if load_format.lower() not in list(LoadFormat):
            return False, f"load_format {load_format!r} is unknown; give one of {', '.join(LoadFormat)}"
        self._shards_change()
        return super().update_weights_from_disk(model_path, load_format, *args, **kwargs)

    def receive_weights_from_distributed(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's; a rank that fails to receive does not load."""
        self._shards_change()
        return super().receive_weights_from_distributed(*args, **kwargs)

    def update_weights_from_tensor(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """As SGLang's."""
        self._shards_change()
        return super().update_weights_from_tensor(*args, **kwargs)

    def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """As SGLang's."""
        self._shards_change()
        return super().update_weights_from_ipc(*args, **kwargs)

    def end_weight_update(self, *args: Any, **kwargs: Any) -> None:
        """As SGLang's, which may have let others write the parameters directly."""
        self._shards_change()
        super().end_weight_update(*args, **kwargs)

    def _shards_change(self) -> None:
        self.get_model_runner().base_weights.stale = True
