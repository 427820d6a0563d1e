"""Every place where sglang_shift meets SGLang's internals: what, why, and the check that it holds.

Nothing else in the package replaces SGLang's code or overrides what steps run through; the CPU
platform (:mod:`sglang_shift.platforms.cpu`) has one replacement of its own. :func:`install` runs in each
rank's process before the scheduler is built, :func:`verify` once more before the model loads; the
launcher calls :func:`check_sources` before it starts any process. ``docs/architecture.md`` carries
this table for readers, and lists the official extension points beside it.
"""

# ruff: noqa: E501

from __future__ import annotations

import hashlib
import inspect
import pkgutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_shift.errors import SeamError
from sglang_shift.seams.digests import DIGESTS

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True)
class Seam:
    """One function or class of SGLang's that this package depends on from the inside.

    Attributes:
        kind: ``replaces`` (assigned over), ``overrides`` (a method of a subclass of ours) or
            ``relies on`` (unchanged, but its body is what makes a seam a seam).
        target: ``module:qualified.name`` in SGLang.
        ours: Where our part is, ``module:qualified.name``; empty for ``relies on``.
        why: What it is for.
    """

    kind: str
    target: str
    ours: str
    why: str

    @property
    def digest(self) -> str | None:
        """Digest of the target's source as of :data:`SGLANG_VERSION`; None for a class replaced whole.

        A class is replaced by a subclass of it; its overridden methods have seams of their own.
        """
        return DIGESTS.get(self.target)


_SP = "sglang.srt.layers.layernorm_sp:"
_EMBEDDING = "sglang.srt.layers.vocab_parallel_embedding:"
_UNQUANTIZED = "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner."
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater."
_CAPTURE = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup:"
_DECODE_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner."
_PREFILL_GRAPHS = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner:PrefillCudaGraphRunner."
_SCHEDULER_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager."
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler."
_TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager."
_STATE = "sglang.srt.managers.scheduler_components.internal_state:SchedulerInternalStateController."

SEAMS: tuple[Seam, ...] = (
    Seam("replaces", _SP + "runs_sp", "sglang_shift.parallel.region:runs_sp",
         "the step's mode decides, not the batch kind"),
    Seam("replaces", _SP + "sp_entry_scatter", "sglang_shift.parallel.region:sp_entry_scatter",
         "a rank's tokens follow its SP index, not its TP rank"),
    Seam("replaces", _SP + "maybe_exit_gather", "sglang_shift.parallel.region:maybe_exit_gather",
         "gathers over the SP group, and only the rows the LM head reads"),
    Seam("replaces", _SP + "column_parallel_g_matmul", "sglang_shift.weights.projections:column_parallel_g_matmul",
         "QKV with its exchange, gate_up without communication"),
    Seam("replaces", _SP + "row_parallel_gbar_matmul", "sglang_shift.weights.projections:row_parallel_gbar_matmul",
         "O with its exchange, down; summed over the base-TP group only"),
    Seam("replaces", _EMBEDDING + "tensor_model_parallel_all_reduce", "sglang_shift.parallel.region:reduce_embedding",
         "each rank completes its own tokens' rows only"),
    Seam("replaces", "sglang.srt.managers.scheduler:Scheduler", "sglang_shift.runtime.scheduler:ShiftScheduler",
         "SGLang's run_scheduler_process builds the class of this name"),
    Seam("replaces", _UNQUANTIZED, "sglang_shift.weights.base_weights:BaseLinearMethod",
         "SGLang's linears build the class of this name"),
    Seam("replaces", "sglang.srt.utils.rank_consensus_checker:_build_payload", "sglang_shift.runtime.rank_consensus:build_payload",
         "what the checker compares is the same on ranks that agree"),
    Seam("overrides", _UNQUANTIZED + ".create_weights", "sglang_shift.weights.base_weights:BaseLinearMethod.create_weights",
         "a weight is created as a view of its base weight"),
    Seam("overrides", _SCHEDULER + "init_tp_model_worker",
         "sglang_shift.runtime.scheduler:ShiftScheduler.init_tp_model_worker", "builds our worker"),
    Seam("overrides", _SCHEDULER + "run_batch", "sglang_shift.runtime.scheduler:ShiftScheduler.run_batch",
         "chooses the step's mode"),
    Seam("overrides", _SCHEDULER + "handle_generate_request",
         "sglang_shift.runtime.scheduler:ShiftScheduler.handle_generate_request",
         "what a request raises is its answer; embeddings replace"),
    Seam("overrides", _SCHEDULER + "_add_request_to_queue",
         "sglang_shift.runtime.scheduler:ShiftScheduler._add_request_to_queue", "a request without tokens is never run"),
    Seam("overrides", _SCHEDULER + "process_batch_result",
         "sglang_shift.runtime.scheduler:ShiftScheduler.process_batch_result", "reports the step once its result is known"),
    Seam("overrides", _SCHEDULER + "on_idle", "sglang_shift.runtime.scheduler:ShiftScheduler.on_idle",
         "renews a drifted calibration"),
    Seam("overrides", _SCHEDULER + "release_host_resources",
         "sglang_shift.runtime.scheduler:ShiftScheduler.release_host_resources", "closes the exchange on all ranks"),
    Seam("overrides", _SCHEDULER + "init_internal_state",
         "sglang_shift.runtime.scheduler:ShiftScheduler.init_internal_state", "live counters in /server_info"),
    Seam("overrides", _STATE + "get_internal_state",
         "sglang_shift.runtime.internal_state:ShiftInternalState.get_internal_state", "live counters in /server_info"),
    Seam("overrides", _STATE + "set_internal_state",
         "sglang_shift.runtime.internal_state:ShiftInternalState.set_internal_state", "policy and thresholds change together"),
    Seam("overrides", _STATE + "_update_handlers",
         "sglang_shift.runtime.internal_state:ShiftInternalState._update_handlers", "policy and thresholds at run time"),
    *(
        Seam("overrides", _SCHEDULER + name, f"sglang_shift.runtime.scheduler:ShiftScheduler.{name}",
             "refused: it would write views of the base weights")
        for name in ("save_remote_model", "save_sharded_model")
    ),
    Seam("overrides", "sglang.srt.managers.tp_worker:TpModelWorker.send_weights_to_remote_instance",
         "sglang_shift.runtime.tp_worker:ShiftTpModelWorker.send_weights_to_remote_instance",
         "refused: it would send views of the base weights"),
    Seam("overrides", "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
         "sglang_shift.runtime.tp_worker:ShiftTpModelWorker.forward_batch_generation", "times the step"),
    Seam("overrides", "sglang.srt.managers.tp_worker:TpModelWorker._init_model_runner",
         "sglang_shift.runtime.tp_worker:ShiftTpModelWorker._init_model_runner", "builds our runner"),
    Seam("overrides", _RUNNER + "load_model", "sglang_shift.runtime.model_runner:ShiftModelRunner.load_model",
         "assembles the base weights around the loaded shards"),
    Seam("overrides", _RUNNER + "init_weight_updater",
         "sglang_shift.runtime.model_runner:ShiftModelRunner.init_weight_updater", "notes that base weights must be gathered again"),
    Seam("overrides", _RUNNER + "check_weights", "sglang_shift.runtime.model_runner:ShiftModelRunner.check_weights",
         "notes that base weights must be gathered again"),
    Seam("relies on", "sglang.srt.utils.weight_checker:WeightChecker.handle", "", "which action writes parameters"),
    Seam("overrides", _RUNNER + "_forward_raw", "sglang_shift.runtime.model_runner:ShiftModelRunner._forward_raw",
         "scopes the step's mode to one forward"),
    Seam("overrides", _RUNNER + "init_cuda_graphs", "sglang_shift.runtime.model_runner:ShiftModelRunner.init_cuda_graphs",
         "captures the graphs of both modes"),
    Seam("overrides", _RUNNER + "init_decode_cuda_graph", "sglang_shift.runtime.model_runner:ShiftModelRunner.init_decode_cuda_graph",
         "captures them again after a weight update"),
    Seam("overrides", _RUNNER + "_decode_cuda_graph_runner_cls",
         "sglang_shift.runtime.model_runner:ShiftModelRunner._decode_cuda_graph_runner_cls",
         "SGLang builds its decode graph runner of this class"),
    Seam("replaces", _CAPTURE + "PrefillCudaGraphRunner", "sglang_shift.graphs.runners:prefill_graph_runner",
         "SGLang builds its prefill graph runner by this name"),
    *(
        Seam("overrides", _DECODE_GRAPHS + name, f"sglang_shift.graphs.runners:SpDecodeGraphRunner.{name}", why)
        for name, why in (
            ("_capture_one_stream", "the groups of the base configuration communicate in a graph"),
            ("capture_one_shape", "captures the forward in SP"),
            ("execute", "counts the exchanges of a replay"),
        )
    ),
    *(
        Seam("overrides", _PREFILL_GRAPHS + name, f"sglang_shift.graphs.runners:SpPrefillGraphRunner.{name}", why)
        for name, why in (
            ("_capture_one_stream", "the groups of the base configuration communicate in a graph"),
            ("_run_forward", "captures the layers in SP"),
            ("_execute_body_capture", "tells the exit from the region how many tokens the graph has"),
        )
    ),
    Seam("overrides",
         "sglang.srt.model_executor.runner.base_cuda_graph_runner:BaseCudaGraphRunner.cuda_graph_output_capacity_rows",
         "sglang_shift.graphs.runners:SpPrefillGraphRunner.cuda_graph_output_capacity_rows",
         "a rank's rows are fewer than the tokens"),
    *(
        Seam("overrides", _UPDATER + name, f"sglang_shift.runtime.model_runner:ShiftWeightUpdater.{name}",
             "notes that base weights must be gathered again")
        for name in (
            "update_weights_from_disk",
            "receive_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
            "end_weight_update",
        )
    ),
    *(
        Seam("overrides", _TOKENIZER + name, f"sglang_shift.runtime.tokenizer_manager:CheckedRequests.{name}", why)
        for name, why in (
            ("generate_request", "refuses more samples than can be made, and unknown labels"),
            ("_validate_one_request", "refuses a request without tokens"),
            ("_create_tokenized_object", "refuses values of another type, and those that fit no tensor"),
            ("start_profile", "refuses a folder that cannot be written"),
            ("configure_logging", "refuses an unknown level"),
            ("_dispatch_to_scheduler", "refuses what the ranks could not read"),
            ("_async_dispatch_to_scheduler", "refuses what the ranks could not read"),
        )
    ),
    Seam("relies on", "sglang.srt.managers.io_struct:msgpack_decode", "", "how the ranks read what they are sent"),
    Seam("relies on", "sglang.srt.arg_groups.memory_hook:reserve_for_graph_mb", "",
         "what is reserved for a second set of graphs"),
    Seam("relies on", _EMBEDDING + "VocabParallelEmbedding.forward", "",
         "sums its rows by that function alone"),
    Seam("relies on", _RUNNER + "_extend_forward_kwargs", "",
         "calls the embedding for all rows where a request replaces some"),
    Seam("relies on", "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend", "",
         "puts together which rows the requests of a step replace"),
    Seam("relies on", _CAPTURE + "capture_decode_graph", "", "captures by the class above, and measures"),
    Seam("relies on", _CAPTURE + "capture_prefill_graph", "", "captures by the name above, and measures"),
    Seam("relies on", "sglang.srt.model_executor.runner.base_cuda_graph_runner:get_batch_sizes_to_capture", "",
         "which batch sizes are captured"),
    Seam("relies on", _PREFILL_GRAPHS + "can_replay_locally", "", "how far a prefill may be padded"),
    Seam("relies on", "sglang.srt.distributed.parallel_state:graph_capture", "",
         "lets SGLang's own groups communicate in a graph, with the custom all-reduce"),
    Seam("relies on", "sglang.srt.layers.linear:ColumnParallelLinear.forward", "",
         "calls column_parallel_g_matmul while sp_active"),
    Seam("relies on", "sglang.srt.layers.linear:RowParallelLinear.forward", "",
         "calls row_parallel_gbar_matmul while sp_active"),
    Seam("relies on", "sglang.srt.layers.layer_boundary.stage:StageBoundary._select", "",
         "enters the region before the first layer"),
    Seam("relies on", "sglang.srt.layers.layer_boundary.factories:_active_variants", "",
         "builds the sequence-parallel variant where flags.sp.enabled"),
    Seam("relies on", "sglang.srt.layers.logits_processor:LogitsProcessor.forward", "",
         "leaves the region before the LM head"),
    Seam("relies on", "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states", "",
         "which rows the LM head reads"),
    Seam("relies on", _SCHEDULER_UPDATER + "begin_weight_update", "",
         "notes the session during which no calibration may run"),
    Seam("relies on", _SCHEDULER_UPDATER + "release_memory_occupation", "",
         "notes the released memory without which no calibration may run"),
    Seam("relies on", "sglang.srt.managers.scheduler:run_scheduler_process", "",
         "builds the module's Scheduler"),
    Seam("relies on", "sglang.srt.configs.update_config:adjust_config_with_unaligned_cpu_tp", "",
         "what the CPU platform keeps from padding KV heads"),
    *(
        Seam("relies on", "sglang.srt.models." + name + ".__init__", "", "which fields of config.json it reads")
        for name in (
            "llama:LlamaDecoderLayer",
            "llama:LlamaAttention",
            "llama:LlamaMLP",
            "qwen2:Qwen2DecoderLayer",
            "qwen2:Qwen2Attention",
            "qwen2:Qwen2MLP",
            "qwen3:Qwen3DecoderLayer",
            "qwen3:Qwen3Attention",
        )
    ),
    Seam("relies on", "sglang.srt.layers.rotary_embedding.factory:get_rope", "",
         "which parameters of a rope it reads"),
)  # fmt: skip


def resolve(path: str) -> Any:
    """The object at ``module:qualified.name``."""
    return pkgutil.resolve_name(path)


def digest_of(obj: Any) -> str:
    """First 16 hex digits of the SHA-256 of ``obj``'s source text."""
    return hashlib.sha256(inspect.getsource(obj).encode()).hexdigest()[:16]


def check_version() -> None:
    """The installed SGLang must be the pinned one.

    Raises:
        SeamError: it is another, or none.
    """
    try:
        found = version("sglang")
    except PackageNotFoundError:
        found = "not installed"
    if found != SGLANG_VERSION:
        raise SeamError(
            f"sglang_shift is written against sglang {SGLANG_VERSION} but sglang here is {found}; "
            f"run: pip install sglang=={SGLANG_VERSION}"
        )


def check_sources() -> None:
    """Version and the source of every seam's target must be those this package was written against.

    Raises:
        SeamError: names the first target that differs.
    """
    check_version()
    for seam in SEAMS:
        if seam.digest is None:
            continue
        try:
            found = digest_of(resolve(seam.target))
        except (ImportError, AttributeError, OSError, TypeError) as error:
            raise SeamError(_changed(seam, f"cannot be read ({error})")) from error
        if found != seam.digest:
            raise SeamError(_changed(seam, f"has source {found} instead of {seam.digest}"))


def _changed(seam: Seam, how: str) -> str:
    return (
        f"{seam.target} of the installed sglang {how}, so sglang_shift cannot trust it; "
        f"reinstall it (pip install --force-reinstall --no-deps sglang=={SGLANG_VERSION}) "
        "or remove the plugin that changes it"
    )


def install() -> None:
    """Check everything, then assign our functions over SGLang's. Once per process, before the scheduler.

    Raises:
        SeamError: a check failed; nothing was replaced.
    """
    check_sources()
    for seam in SEAMS:
        if seam.kind == "replaces":
            module, _, name = seam.target.partition(":")
            setattr(sys.modules[module], name, resolve(seam.ours))
    verify()


def verify() -> None:
    """Every seam must really be in place.

    Raises:
        SeamError: names the first that is not.
    """
    for seam in SEAMS:
        if seam.kind == "relies on":
            continue
        ours = resolve(seam.ours)
        if seam.kind == "replaces":
            holds = resolve(seam.target) is ours
        else:
            owner, _, name = seam.ours.rpartition(".")
            stock_owner, _, stock_name = seam.target.rpartition(".")
            holds = name == stock_name and name in vars(resolve(owner))
            # The stock class may itself have been replaced by our subclass by now.
            holds = holds and any(c.__name__ == stock_owner.rpartition(":")[2] for c in resolve(owner).__mro__)
        if not holds:
            raise SeamError(
                f"{seam.target} is not served by {seam.ours} in this process: something replaced it after "
                "sglang_shift did; remove the plugin that changes it"
            )
