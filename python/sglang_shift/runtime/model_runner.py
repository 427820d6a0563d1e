"""The model runner builds base weights and the CUDA graphs of both modes, and runs each forward in its mode."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import attention_backends_of, resolved_view
from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
from sglang.srt.model_executor.cuda_graph_config import Phase
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_exec, get_flags, get_parallel, get_schedule
from sglang.srt.utils import get_available_gpu_memory, rank_consensus_checker
from sglang_shift_kernels.operations import ExchangeShape, warm_up

from sglang_shift.config import ShiftConfig
from sglang_shift.graphs.mode_graphs import ModeGraphs, limit_sizes
from sglang_shift.graphs.runners import SpDecodeGraphRunner
from sglang_shift.layers.adapters import pass_over_adapters
from sglang_shift.layers.embedding import let_rows_replace
from sglang_shift.layers.pipelined import add_pipelines
from sglang_shift.layers.sp_model import SpModel
from sglang_shift.models.families import check_class
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange.base import ExchangeVolume, SequenceExchange
from sglang_shift.parallel.exchange.choose import Operands, make_exchange
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import Step, current, run_step
from sglang_shift.parallel.topology import Topology, build_topology
from sglang_shift.platforms.shards import refuse_fused_writes
from sglang_shift.resolution import shift_config_of
from sglang_shift.runtime.exchange_pipeline import ExchangePipeline
from sglang_shift.runtime.weight_updater import ShiftWeightUpdater
from sglang_shift.seams import overrides, relies_on
from sglang_shift.weights.base_weights import BaseWeights, WeightReport, loading_for

logger = logging.getLogger(__name__)


class ShiftModelRunner(ModelRunner):
    """SGLang's model runner with a base configuration beside full TP.

    Attributes:
        mode: The mode of the next step. Forwards outside of :meth:`running_in` (warm-up, autotuning) run in TP.
        topology: The topology of the next step. It may be replaced between two steps.
        sp_model: The model as SP steps run it.
        takes_rows: Whether requests may bring rows in place of the embeddings of tokens.
        base_weights: The base weights for the topology.
        forwards: The methods that the next SP step runs in place of SGLang's.
        exchange_volume: How much the exchanges of an SP step send.
        exchange_pipeline: Which SP steps exchange their heads group by group.
        capture_mode: The mode of the CUDA graphs that SGLang captures now.
        graphs: The CUDA graphs of both modes.
    """

    mode: Mode = Mode.TP
    topology: Topology
    sp_model: SpModel
    takes_rows: bool
    base_weights: BaseWeights
    forwards: Forwards
    exchange_volume: ExchangeVolume
    exchange_pipeline: ExchangePipeline
    capture_mode: Mode = Mode.TP
    graphs: ModeGraphs
    weight_report: WeightReport
    weight_updater: WeightUpdater
    decode_cuda_graph_runner: Any
    prefill_cuda_graph_runner: Any
    weight_load_mem_usage: float

    @overrides("Our method assembles the base weights around the loaded shards.")
    @relies_on(
        "sglang.srt.layers.layer_boundary.factories:_active_variants",
        "This function builds the sequence-parallel variant of a layer if flags.sp.enabled is set.",
    )
    def load_model(self) -> None:
        """Load the stock full-TP shards, then assemble the base weights around them."""
        config = shift_config_of(self.server_args)
        assert config is not None
        self.topology = build_topology(RankLayout(config.world_size, config.sp_size))
        get_flags().sp.enabled = True  # SGLang builds layers with its sequence-parallel batch variant
        try:
            with loading_for(self.topology):
                super().load_model()
        finally:
            get_flags().sp.enabled = False  # a draft model has no such layers
        check_class(self.model, self.model_config.hf_config.architectures[0])
        if self.device == "cuda":
            settings = resolved_view(self.server_args)
            (backend, *_) = attention_backends_of(settings)
            if not str(settings.kv_cache_dtype).startswith("fp8"):  # SGLang fuses no writes to such a cache
                refuse_fused_writes(self.model, settings.dcp_size, str(backend))
        before = self._free_gib() + self.weight_load_mem_usage
        backup = get_exec().features.enable_weights_cpu_backup
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_WEIGHTS, enable_cpu_backup=backup):
            self.sp_model = SpModel(
                self.model,
                self.topology,
                replicate_experts=config.experts == "replicated",
                pools=not self.is_generation,
            )
        self.takes_rows = let_rows_replace(self.model)
        self.base_weights, self.forwards = self.sp_model.weights, self.sp_model.forwards
        self.weight_report = self.base_weights.report()
        # /server_info reports this as the memory of the weights, in GiB. The exchange takes its own memory later.
        self.weight_load_mem_usage = before - self._free_gib()
        exchange = self._exchange(config)
        self.topology = replace(self.topology, exchange=exchange)
        self.exchange_volume = self.sp_model.exchange_volume(exchange, self.dtype)
        self.exchange_pipeline = ExchangePipeline()
        if config.exchange_pipeline != "off":
            groups = add_pipelines(self.model, self.sp_model)
            self.exchange_pipeline = ExchangePipeline(groups, 1 if config.exchange_pipeline == "on" else None)
            if config.exchange_pipeline == "on":
                logger.info("sglang_shift: In SP, %s.", self.exchange_pipeline.text)
        if self.device != "cpu":  # on a CPU gloo keeps hardly any memory
            self._warm_up_collectives()
        logger.info(
            "sglang_shift: SP=%d x TP=%d and TP=%d share %d bytes of weights on this rank, "
            "%d bytes beyond the base configuration's%s. Linears in SP: %s. The exchange is: %s.",
            config.sp_size,
            self.topology.layout.base_tp_size,
            config.world_size,
            self.weight_report.total,
            self.weight_report.beyond_base,
            " (replicated KV heads)" if self.weight_report.beyond_base else "",
            self.base_weights.text,
            exchange.text,
        )

    @overrides("After SGLang has wrapped layers for LoRA adapters, our method lets SP steps run the wrapped layers.")
    def init_lora_manager(self) -> None:
        super().init_lora_manager()
        pass_over_adapters(self.model, self.sp_model.forwards)

    def _free_gib(self) -> float:
        return get_available_gpu_memory(self.device, self.gpu_id)

    def _exchange(self, config: ShiftConfig) -> SequenceExchange:
        """Make the exchange for this model's projections and the largest step, and compile its kernels."""
        columns, size = self.sp_model.exchange_columns, config.sp_size
        operands = Operands(most_tokens(), size * max(columns), self.dtype)
        exchange = make_exchange(config, self.topology.sp_group, self.device, get_parallel().nnodes, operands)
        if self.device == "cuda":
            # Graphs of SP have multiples of S tokens. Without the warm-up, the first step that has no multiple would
            # compile kernels while it serves.
            shape = ExchangeShape(size, 2, max(columns), min(columns))
            warm_up(shape, self.model_config.hidden_size, self.dtype, self.device, exchange.fp8)
        return exchange

    def _warm_up_collectives(self) -> None:
        """Make NCCL allocate its memory for SP steps now, because the KV pool later takes all free memory."""
        width = self.topology.layout.sp_size * max(self.sp_model.exchange_columns)
        self.topology.warm_up(most_tokens(), self.model_config.hidden_size, width, self.dtype, self.device)
        current_platform.synchronize()
        current_platform.empty_cache()  # free the tensors of the warm-up

    @overrides("Our method installs our weight updater, which marks the base weights as stale.")
    def init_weight_updater(self) -> None:
        """Use our weight updater, so that the base weights follow every weight update of SGLang."""
        super().init_weight_updater()
        stock = self.weight_updater
        self.weight_updater = ShiftWeightUpdater(**{f.name: getattr(stock, f.name) for f in fields(stock)})

    @overrides("Our method marks the base weights as stale if the checker resets this rank's weights.")
    @relies_on(
        "sglang.srt.utils.weight_checker:WeightChecker.handle", "This method decides which action writes parameters."
    )
    def check_weights(self, action: str, *args: Any, **kwargs: Any) -> Any:
        """Run SGLang's weight checker. Its action ``reset_tensors`` writes this rank's shards, too."""
        if action == "reset_tensors":
            self.base_weights.stale = True
        return super().check_weights(action, *args, **kwargs)

    @overrides("Our method captures the graphs of both modes.")
    def init_cuda_graphs(self, *args: Any, **kwargs: Any) -> None:
        config = shift_config_of(self.server_args)
        assert config is not None
        # With instances, each level captures its own graphs later.
        with limit_sizes(dict.fromkeys(Phase.ALL, ())) if config.instances else nullcontext():
            self.capture_graphs(config, *args, **kwargs)

    def capture_graphs(self, config: ShiftConfig, *args: Any, **kwargs: Any) -> None:
        """Capture the graphs of both modes, in place of those that there are.

        Args:
            config: It has the policy, S, and the largest number of graphs in SP.
            *args: Arguments of SGLang's ``init_cuda_graphs``, and so are ``kwargs``.
        """
        self.graphs = ModeGraphs(self, config)
        self.graphs.capture(partial(super().init_cuda_graphs, *args, **kwargs))

    @overrides("After a weight update, our method captures the decode graphs of both modes again.")
    def init_decode_cuda_graph(self) -> None:
        """Capture the graphs of decode steps again, in both modes. A weight update may ask for it.

        With instances, the graphs of all levels stay, because weights keep their addresses.
        """
        config = shift_config_of(self.server_args)
        assert config is not None
        if config.instances:
            return
        self.graphs.capture(super().init_decode_cuda_graph, (Phase.DECODE,))

    @overrides("SGLang makes its decode graph runner from the class that this method returns.")
    def _decode_cuda_graph_runner_cls(self) -> type:
        return SpDecodeGraphRunner if self.capture_mode is Mode.SP else super()._decode_cuda_graph_runner_cls()

    @contextmanager
    def running_in(self, mode: Mode) -> Iterator[None]:
        """Steps inside of this context run in ``mode``, and the runner has the graphs of ``mode``.

        A worker of speculative decoding prepares the graph of a step before its forward.
        """
        self.mode = mode
        try:
            with self.graphs.install(mode):
                yield
        finally:
            self.mode = Mode.TP

    @overrides("Our method runs each forward as one step, with its mode, its topology and its graphs.")
    def forward(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> ModelRunnerOutput:
        """Run one step: SGLang's forward, in the step's mode and with its CUDA graphs."""
        step = self.step(self.mode, forward_batch)
        if step.sharded and self.base_weights.stale:
            self.base_weights.refresh()  # the refresh must run on the forward's stream, as it does here
        span = torch.profiler.record_function(f"sglang_shift {step.mode.value} step")
        if step.pipelined:
            self.exchange_pipeline.steps += 1
            rank_consensus_checker.assert_same("sglang_shift exchanges heads group by group")
        with span, run_step(step):
            return super().forward(forward_batch, *args, **kwargs)

    def step(self, mode: Mode, batch: ForwardBatch, has_exit: bool = True) -> Step:
        """Make the context of one step: see :class:`Step`."""
        pipelined = mode is Mode.SP and has_exit and self.exchange_pipeline.applies_to(batch)
        return Step(mode, self.topology, batch, self.forwards, has_exit, pipelined)

    @overrides("If requests bring their own embeddings, our method keeps the rows of this rank.")
    def _extend_forward_kwargs(self, forward_batch: ForwardBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the model's ``forward``. If they have rows of all tokens, enter the region here."""
        arguments: dict[str, Any] = super()._extend_forward_kwargs(forward_batch, *args, **kwargs)
        step = current()
        if step is not None and step.sharded and "input_embeds" in arguments:
            arguments["input_embeds"] = scatter_tokens(step, arguments["input_embeds"])
        return arguments


def most_tokens() -> int:
    """The most tokens of a step: a chunk, or ``max_prefill_tokens`` if SGLang does not chunk prefills."""
    schedule = get_schedule()
    chunk = schedule.chunked_prefill_size or 0
    return int(chunk if chunk > 0 else schedule.max_prefill_tokens)
