"""The scheduler chooses the mode of each step, from state that is equal on every rank."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from http import HTTPStatus
from itertools import islice
from typing import Any

import msgspec
from sglang.srt.beam_search.batch_tail import num_beam_member_rows
from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.io_struct import (
    AbortReq,
    AddExternalCorpusReqInput,
    AddExternalCorpusReqOutput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.runtime_context import get_device, get_model, get_parallel, get_serving
from sglang.srt.utils import rank_consensus_checker

from sglang_shift import seams
from sglang_shift.config import ShiftConfig
from sglang_shift.cost.measure import kv_reads
from sglang_shift.errors import Refused
from sglang_shift.flags import POLICIES
from sglang_shift.modes import MODES, PENDING_REQUESTS, Mode, StepState
from sglang_shift.observe.events import Publisher, StateEvent
from sglang_shift.parallel.exchange.base import ExchangeCounter
from sglang_shift.platforms import cpu, fa3_shards
from sglang_shift.policy.builtin import FixedMode, RankZeroPolicy
from sglang_shift.policy.selector import DOUBTS, Decision, ModeSelector, make_policy
from sglang_shift.resolution import shift_config_of
from sglang_shift.runtime import agreement
from sglang_shift.runtime.admission import NO_TOKENS, replace_input_embeds
from sglang_shift.runtime.calibrator import Calibrator
from sglang_shift.runtime.chunk_sizer import ChunkSizer
from sglang_shift.runtime.internal_state import ShiftInternalState
from sglang_shift.runtime.kv_report import kv_report
from sglang_shift.runtime.mode_check import ModeCheck
from sglang_shift.runtime.rank_consensus import same_everywhere
from sglang_shift.runtime.released_memory import ShiftWeightUpdaterManager
from sglang_shift.runtime.reporter import ShiftOutputStreamer, StepReporter
from sglang_shift.runtime.sparse_prefill import SparsePrefill
from sglang_shift.runtime.speculation import verify_width
from sglang_shift.runtime.tp_only import reason_for_tp, tp_rules
from sglang_shift.runtime.tp_worker import EXPORT_REFUSED, ShiftTpModelWorker
from sglang_shift.seams import extends, overrides, relies_on, substitutes_for
from sglang_shift.start_up_log import NOT_ON_CPU, quiet_other_ranks

logger = logging.getLogger(__name__)


@substitutes_for(
    "sglang.srt.managers.scheduler:Scheduler",
    "SGLang's run_scheduler_process makes the scheduler from the class of this name.",
    exclusive=True,
)
class ShiftScheduler(Scheduler):
    """SGLang's scheduler, which also chooses a mode for each step."""

    tp_worker: ShiftTpModelWorker
    weight_updater: SchedulerWeightUpdaterManager
    shift_sparse = SparsePrefill(0.0, None, agreement.from_all_ranks)  # all is exact until the backend is built

    @staticmethod
    def shift_variant(server_args: Any = None, *_: Any, **__: Any) -> type[ShiftScheduler]:
        """The class of the scheduler of a rank: with instances, one that changes its level."""
        config = shift_config_of(server_args)
        if config is None or not config.instances:
            return ShiftScheduler
        from sglang_shift.runtime.instance_scheduler import InstanceScheduler  # it is a subclass of this class

        return InstanceScheduler

    @overrides("Our method calibrates after SGLang has built everything.")
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parallel = get_parallel()
        # The first rank of each node logs.
        with quiet_other_ranks(parallel.tp_rank % max(1, parallel.tp_size // parallel.nnodes) == 0):
            super().__init__(*args, **kwargs)
        self.shift_width = verify_width()
        self.shift_chunks = ChunkSizer(self)
        backend = self.tp_worker.model_runner.attn_backend
        self.shift_sparse = SparsePrefill(self.shift_config.sparse_prefill, backend, agreement.from_all_ranks)
        self.shift_tp_rules = tp_rules(adapters=bool(self.enable_lora), images=self.model_config.is_multimodal)
        self.shift_chunk = min(
            self.chunked_prefill_size or self.max_prefill_tokens, self.max_prefill_tokens, self.max_total_num_tokens
        )
        if self.shift_config.check == "on":
            result = ModeCheck(self).run()
            logger.log(logging.INFO if parallel.tp_rank == 0 else logging.DEBUG, "sglang_shift: %s", result)
        self.shift_calibrator = Calibrator(self, self.shift_config, self.shift_chunk)
        self.shift_selector.calibration = self.shift_calibrator.start()
        self.set_policy(self.shift_config)
        self.shift_exchange_counter = ExchangeCounter(self.tp_worker.model_runner.exchange_volume)
        self.shift_reporter: StepReporter | None = None
        if parallel.tp_rank == 0:
            self.shift_reporter = self.make_reporter()
            logger.info("sglang_shift: The policy is: %s.", self.shift_selector.policy_text)
            logger.debug("sglang_shift: %s", self.shift_config)
        self.shift_watch = agreement.StepWatch.of_replica()

    def make_reporter(self) -> StepReporter:
        """The reporter of this rank. Only the first rank of a replica uses one."""
        publisher = Publisher(get_parallel().dp_rank or 0)
        return StepReporter(self.shift_selector, publisher, self.shift_event, self.shift_exchange_counter)

    @overrides("Our method builds our TP worker.")
    def init_tp_model_worker(self) -> None:
        """Check versions and settings against the other ranks, then build our worker."""
        config = shift_config_of(self.server_args)
        assert config is not None
        seams.verify()
        cpu.verify()
        agreement.check(config)
        fa3_shards.register()
        self.shift_config = config
        # This policy stays until everything is built. SGLang runs no step before that.
        self.shift_selector = ModeSelector(FixedMode(Mode.TP))
        self.tp_worker = ShiftTpModelWorker(
            server_args=self.server_args,
            gpu_id=get_device().gpu_id,
            nccl_port=self.nccl_port,
        )

    @overrides("Our method installs our manager, which stays alive if an operator releases or resumes memory wrongly.")
    def init_weight_updater(self) -> None:
        super().init_weight_updater()
        stock = self.weight_updater
        values = {field.name: getattr(stock, field.name) for field in fields(stock) if field.init}
        self.weight_updater = ShiftWeightUpdaterManager(**values)

    @overrides("Our method closes the exchange, on every rank.")
    def release_host_resources(self) -> None:
        """Release this rank's resources, then close the exchange, while the other ranks still answer.

        SGLang calls this only when the server ends in the normal way. If the exchange cannot be closed, the process
        must still end.
        """
        self.shift_watch.stop()
        super().release_host_resources()
        try:
            self.tp_worker.model_runner.topology.exchange.close()
        except Exception:
            logger.exception("sglang_shift: the exchange could not be closed")

    def set_policy(self, config: ShiftConfig) -> None:
        """Use the policy of ``config`` from the next step on."""
        self.shift_config = config
        selector, failed_mode = self.shift_selector, self.shift_calibrator.failed_mode
        costs = None if selector.calibration is None else selector.calibration.costs
        if failed_mode is not None and config.policy == "calibrated":
            selector.policy = FixedMode(next(mode for mode in MODES if mode is not failed_mode))
        else:
            policy = make_policy(config, costs, self.shift_chunk)
            if config.policy not in POLICIES:  # the policy is a class of the user
                policy = RankZeroPolicy(policy, get_parallel().tp_rank == 0, self._from_rank_0)
            selector.policy = policy
        self.shift_chunks.target = config.tbt_target / 1e3
        selector.longest_probe = self.shift_chunks.target if self.shift_chunks.active else math.inf
        if config.policy == "calibrated" and costs is None:
            logger.warning("sglang_shift: without a calibration, the policy is: %s", selector.policy_text)
            if config.tbt_target:
                logger.warning("sglang_shift: without a calibration, --shift-tbt-target has no effect")

    @overrides("With a bound on the gap between tokens, our class fills a step with the prompt tokens that fit it.")
    def get_prefill_adder_class(self) -> Any:
        """Our adder, or SGLang's class if there is no bound."""
        return self.shift_chunks.make_adder if self.shift_chunks.active else super().get_prefill_adder_class()

    @overrides("With a bound on the gap between tokens, our method decides whether prompts and decodes share the step.")
    def _get_new_batch_prefill_raw(self, prefill_delayer_single_pass: Any, running_batch: ScheduleBatch) -> Any:
        self.is_mixed_chunk = self.shift_chunks.mixes(running_batch)
        return super()._get_new_batch_prefill_raw(prefill_delayer_single_pass, running_batch)

    @overrides("With a bound on the gap between tokens, a decode step follows a step of prompts that had no decodes.")
    def _should_defer_prefill(self, running_batch: ScheduleBatch) -> bool:
        deferred = super()._should_defer_prefill(running_batch)
        return self.shift_chunks.defers_prompts(running_batch) or deferred

    @overrides("Our method chooses the mode of the step.")
    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        chunk = self.shift_chunks.take_chunk(batch)
        decision = self.choose_mode(batch)
        if decision is None:
            return super().run_batch(batch, *args, **kwargs)
        runner = self.tp_worker.model_runner
        with runner.running_in(decision.mode), self.shift_sparse.running(batch) as sparse:
            result = super().run_batch(batch, *args, **kwargs)
        step, mode = decision.step, decision.mode
        replayed = runner.graphs.for_phase(step.num_prefill_tokens > 0).count(mode, result.can_run_cuda_graph)
        if mode is Mode.SP:
            self.shift_exchange_counter.count(step.padded[mode] if replayed else step.num_tokens)
        if self.shift_reporter is not None:
            lap = self.tp_worker.last_lap
            self.shift_reporter.on_launch(batch.forward_iter, decision, lap, replayed, chunk, sparse=sparse)
        return result

    def choose_mode(self, batch: ScheduleBatch) -> Decision | None:
        """Choose the mode of a step; None if the step has no tokens, because such a step does not run the model."""
        step = self.step_state(batch)
        if step.num_tokens == 0:
            return None
        decision = self.shift_selector.choose(step)
        self.shift_watch.record(step.num_tokens, step.num_prefill_tokens, decision.mode)
        selector = self.shift_selector
        if selector.must_agree_on_drift or self.shift_chunks.must_agree(selector.count):
            self._agree_on_drift()
        rank_consensus_checker.assert_same("sglang_shift step %s in %s", decision.step, decision.mode)
        return decision

    @staticmethod
    def _from_rank_0(number: int) -> int:
        return int(agreement.from_rank_0([number])[0])

    def _agree_on_drift(self) -> None:
        """From the next step on, every rank uses rank 0's doubts about the predicted times, and its margin for them.

        Only rank 0 measures these, with its clock.
        """
        drift = None if self.shift_reporter is None else self.shift_reporter.drift
        doubts, margin = (drift.doubts, drift.margin) if drift is not None else ({}, 1.0)
        *shared, margin = agreement.from_rank_0([*(doubts.get(doubt, 0.0) for doubt in DOUBTS), margin])
        self.shift_selector.set_doubts({doubt: share for doubt, share in zip(DOUBTS, shared, strict=True) if share})
        self.shift_chunks.margin = margin

    @property
    def shift_calibrated(self) -> bool:
        """Whether there are step times to decide by."""
        return self.shift_selector.calibration is not None

    def shift_modes(self) -> tuple[Mode, ...]:
        """The modes that the policy may choose for steps with nothing that needs TP."""
        policy = self.shift_selector.policy
        return (policy.mode,) if isinstance(policy, FixedMode) else tuple(MODES)

    def step_state(self, batch: ScheduleBatch) -> StepState:
        """The state that the policy gets. It may only hold values that are equal on every rank."""
        mode = batch.forward_mode
        running, reads, decode_reads, width = self.running_batch.batch_size(), 0, 0, 1
        if mode.is_idle() or mode.is_prebuilt():
            tokens = prefill = 0
        elif mode.is_extend():
            tokens = batch.extend_num_tokens
            if batch.decoding_reqs:  # a mixed step decodes one token for each of these, and running_batch lacks them
                running = len(batch.decoding_reqs)
                prefill = tokens - running
                decode_reads = sum(map(kv_reads, batch.prefix_lens[-running:], batch.extend_lens[-running:]))
            else:
                prefill = tokens
            reads = sum(map(kv_reads, batch.prefix_lens, batch.extend_lens))
        else:
            width = self.shift_width
            tokens, prefill = (batch.batch_size() + num_beam_member_rows(batch.reqs)) * width, 0
            # Speculative decoding may not know the lengths of the sequences before the step before has ended. The
            # requests know the tokens that the scheduler has processed, and these are the same on every rank.
            reads = (
                int(batch.seq_lens_cpu.sum()) if width == 1 else sum(kv_reads(r.seqlen - 1, width) for r in batch.reqs)
            )
        pending = sum(req.seqlen for req in islice(self.waiting_queue, PENDING_REQUESTS))
        if self.chunked_req is not None:
            pending += max(0, len(self.chunked_req.origin_input_ids) - (self.chunked_req.extend_end or 0))
        return StepState(
            num_tokens=tokens,
            num_prefill_tokens=prefill,
            num_running=running,
            num_waiting=len(self.waiting_queue),
            pending_prefill_tokens=pending,
            padded=self.tp_worker.model_runner.graphs.for_phase(prefill > 0).padded(tokens, width),
            kv_reads=reads,
            width=width,
            needs_tp=reason_for_tp(self.shift_tp_rules, batch),
            decode_kv_reads=decode_reads,
        )

    @overrides(
        "Our method answers a request with the error that it raises. It also prepares embeddings that a request brings."
    )
    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput, **kwargs: Any) -> None:
        """Handle a request. It may bring embeddings in place of tokens."""
        with self._answering(recv_req):
            replace_input_embeds(recv_req)
            self._check_rows(recv_req)
            super().handle_generate_request(recv_req, **kwargs)

    @overrides("Our method answers a request with the error that it raises.")
    def handle_embedding_request(self, recv_req: TokenizedEmbeddingReqInput, **kwargs: Any) -> None:
        with self._answering(recv_req):
            self._check_rows(recv_req)
            super().handle_embedding_request(recv_req, **kwargs)

    def _check_rows(self, request: Any) -> None:
        runner = self.tp_worker.model_runner
        if request.positional_embed_overrides is not None and not runner.takes_rows:
            raise ValueError(f"{type(runner.model).__name__} takes no embeddings in place of tokens; send tokens")

    @contextmanager
    def _answering(self, request: Any) -> Iterator[None]:
        """If an error is raised in this context, it is the answer to the request, and the server goes on.

        Every rank has the same requests in the same state, so every rank refuses the request.
        """
        try:
            yield
        except Exception as error:
            logger.exception("sglang_shift: the request %s is refused", request.rid)
            rank_consensus_checker.assert_same("sglang_shift refuses %s: %s", request.rid, same_everywhere(str(error)))
            reason = FINISH_ABORT(f"the request cannot be run: {error}; correct it", HTTPStatus.BAD_REQUEST)
            self.send_abort_output(AbortReq(rid=request.rid, finished_reason=reason.to_json()), request)

    @overrides(
        "Our method answers a request without tokens with an error, and the request never runs. It also decides if the "
        "request's prompt may leave out blocks, because its cached prefix is looked up later."
    )
    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        """Queue a request. If it still has no tokens, it gets an error as its answer, and never runs."""
        self.shift_sparse.admit(req)
        if not req.origin_input_ids:
            req.set_finish_with_abort(NO_TOKENS)
        super()._add_request_to_queue(req, is_retracted)

    @overrides("Our method reports the step when its result is known.")
    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        reporter = self.shift_reporter
        if reporter is None:
            return super().process_batch_result(batch, result)
        reporter.before_result(batch)
        super().process_batch_result(batch, result)
        return reporter.after_result(batch)

    @overrides("Our method reports the requests of a prefill server. They finish after their last step.")
    def process_disagg_prefill_inflight_queue(self, *args: Any, **kwargs: Any) -> list[Req]:
        done: list[Req] = super().process_disagg_prefill_inflight_queue(*args, **kwargs)
        if self.shift_reporter is not None:
            self.shift_reporter.on_transfer(done)
        return done

    @overrides("Our method renews a calibration that has drifted.")
    def on_idle(self) -> None:
        """If step times have drifted, renew the calibration while the server is idle, a few laps at a time."""
        if not self.waiting_queue and self.running_batch.is_empty() and self.chunked_req is None:
            self.renew_calibration()
        if self.shift_reporter is not None:
            self.shift_reporter.tick()
        super().on_idle()

    def renew_calibration(self) -> bool:
        """Measure for a turn, if step times have drifted. All ranks call it; no request runs or waits.

        Returns:
            Whether there is a new calibration now.
        """
        reporter, selector = self.shift_reporter, self.shift_selector
        drifted = reporter is not None and reporter.drift.drifted
        calibration = self.shift_calibrator.idle(selector.count, drifted)
        if calibration is None:
            return False
        selector.calibration = calibration
        self.set_policy(self.shift_config)
        if reporter is not None:
            reporter.on_calibration()
        return True

    @overrides("Our method does not sleep during a calibration, which would go on once a second.")
    def maybe_sleep_on_idle(self) -> None:
        """With ``--sleep-on-idle``, wait for a request, unless a calibration has more to measure."""
        if not self.shift_calibrator.measuring:
            super().maybe_sleep_on_idle()

    @overrides("Our method returns when the corpus is loaded, so that all ranks draft from it from the same step on.")
    @relies_on(
        "sglang.srt.speculative.external_corpus_manager:ExternalCorpusManager.add",
        "This method loads the corpus in a thread, and drafts come from it as soon as it is loaded.",
    )
    @relies_on(
        "sglang.srt.speculative.external_corpus_manager:ExternalCorpusManager.check_pending_load",
        "This method answers the request if the thread has ended.",
    )
    def add_external_corpus(self, recv_req: AddExternalCorpusReqInput) -> AddExternalCorpusReqOutput | None:
        """Load a corpus of NGRAM before the next step. Threads of several ranks would not end in the same step."""
        output: AddExternalCorpusReqOutput | None = super().add_external_corpus(recv_req)
        manager = self.external_corpus_manager
        if manager is not None and manager._pending_load is not None:
            _, thread = manager._pending_load
            thread.join()
            manager.check_pending_load()
        return output

    @overrides("Our streamer sends the steps of each request by mode to the tokenizer manager.")
    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        """Our output streamer. SGLang's Rust server needs SGLang's streamer, because it reads no additional fields."""
        return ShiftOutputStreamer if self.rust_server is None else super().get_output_streamer_class()

    @overrides("Our internal state adds live counters to /server_info.")
    def init_internal_state(self) -> None:
        self.internal_state = ShiftInternalState(scheduler=self, record_step_time=sglang_scheduler.RECORD_STEP_TIME)

    @overrides("Our method refuses the export, because SGLang's method would write views of the base weights.")
    def save_remote_model(self, **kwargs: Any) -> None:
        """Refuse the export. SGLang's RPC answers with the reason.

        Raises:
            Refused: always.
        """
        raise Refused(EXPORT_REFUSED)

    @overrides("Our method refuses the export, because SGLang's method would write views of the base weights.")
    def save_sharded_model(self, **kwargs: Any) -> None:
        self.save_remote_model(**kwargs)

    def shift_event(self) -> StateEvent:
        """The event with the state that changes rarely. Only rank 0 sends it to subscribers."""
        selector, report, reporter = self.shift_selector, self.tp_worker.model_runner.weight_report, self.shift_reporter
        return StateEvent(
            time=time.time(),
            world_size=self.shift_config.world_size,
            sp_size=self.shift_config.sp_size,
            model=get_serving().served_model_name or get_model().model_path,
            policy=self.shift_config.policy,
            policy_text=selector.policy_text,
            calibration=None if selector.calibration is None else msgspec.to_builtins(selector.calibration),
            calibration_text=self.shift_calibrator.text,
            drift={mode: reporter.drift.ratio(mode) if reporter else None for mode in MODES},
            weight_bytes=report.total,
            weight_bytes_beyond_base=report.beyond_base,
            **selector.counters(),
            running=self.running_batch.batch_size(),
            waiting=len(self.waiting_queue),
            replica=get_parallel().dp_rank or 0,
            tbt_target=self.shift_chunks.target if self.shift_chunks.active else 0.0,
            tbt_margin=self.shift_chunks.margin,
        )

    def shift_state(self) -> dict[str, Any]:
        """Live counters of this rank, for ``/server_info``."""
        selector, runner = self.shift_selector, self.tp_worker.model_runner
        report, calibration = runner.weight_report, selector.calibration
        return {
            "sp_size": self.shift_config.sp_size,
            "base_tp_size": runner.topology.layout.base_tp_size,
            "policy": selector.policy_text,
            "calibration": self.shift_calibrator.text,
            "costs": None if calibration is None else msgspec.to_builtins(calibration.costs),
            **selector.counters(),
            "exchange": runner.topology.exchange.text,
            "exchange_pipeline": runner.exchange_pipeline.report(),
            "exchanges": self.shift_exchange_counter.calls,
            "exchanged_bytes": self.shift_exchange_counter.bytes_sent,
            "weight_bytes": report.total,
            "weight_bytes_beyond_base": report.beyond_base,
            **kv_report(runner),
            "graphs": runner.graphs.report(),
            "chunks": self.shift_chunks.report(),
            "sparse_prefill": self.shift_sparse.report(),
        }


@extends(
    "sglang.srt.entrypoints.http_server:launch_server",
    "Each rank puts our code in place before SGLang builds the rank's scheduler.",
)
@relies_on(
    "sglang.srt.managers.scheduler:run_scheduler_process", "This function makes the scheduler from the class Scheduler."
)
def run_scheduler_process(
    server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, pp_rank: int, dp_rank: int | None, *args: Any
) -> None:
    """Run SGLang's function of this name in a rank's process. With our flags, it builds our scheduler.

    Without our flags, nothing of SGLang is replaced. With instances, each rank has addresses of its own, and its rank
    is also its number as a replica, for the log, the events and the loads.
    """
    config = shift_config_of(server_args)
    if config is not None:
        if cpu.is_active():
            os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(NOT_ON_CPU))
        seams.install()
        if config.instances:
            from sglang_shift.runtime.instance_channels import ports_of_rank

            port_args, dp_rank = ports_of_rank(port_args, tp_rank), tp_rank
    sglang_scheduler.run_scheduler_process(server_args, port_args, gpu_id, tp_rank, pp_rank, dp_rank, *args)
