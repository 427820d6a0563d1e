"""The scheduler: chooses each step's mode, from state that every rank shares."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from sglang.srt.managers import scheduler as sglang_scheduler
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController
from sglang.srt.runtime_context import get_device
from sglang.srt.utils import rank_consensus_checker

from sglang_shift import agreement, platform, seams
from sglang_shift.config import ShiftConfig, shift_config_of
from sglang_shift.errors import Refused
from sglang_shift.modes import Mode, StepState
from sglang_shift.region import region
from sglang_shift.worker import EXPORT_REFUSED, ShiftTpModelWorker

logger = logging.getLogger(__name__)


class ShiftScheduler(Scheduler):
    """SGLang's scheduler that runs each step in TP or in SP."""

    tp_worker: ShiftTpModelWorker

    def init_tp_model_worker(self) -> None:
        """Agree with the other ranks on versions and settings, then build our worker."""
        config = shift_config_of(self.server_args)
        assert config is not None
        seams.verify()
        platform.verify()
        agreement.check(config)
        self.set_policy(config)
        self.shift_steps = dict.fromkeys(Mode, 0)
        self.shift_tokens = dict.fromkeys(Mode, 0)
        self.shift_switches = 0
        self.shift_last_mode: Mode | None = None
        self.tp_worker = ShiftTpModelWorker(
            server_args=self.server_args,
            gpu_id=get_device().gpu_id,
            nccl_port=self.nccl_port,
        )
        logger.info("sglang_shift: %s; policy: %s", config, self.shift_policy.describe())

    def set_policy(self, config: ShiftConfig) -> None:
        """Choose modes by ``config``'s policy from the next step on."""
        self.shift_config = config
        self.shift_policy = config.make_policy()

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Run one step in the mode that the policy chooses for it."""
        mode = self.choose_mode(batch)
        with self.tp_worker.model_runner.running_in(mode):
            return super().run_batch(batch, *args, **kwargs)

    def choose_mode(self, batch: ScheduleBatch) -> Mode:
        """The step's mode. Steps without tokens run no model and stay TP."""
        step = self.step_state(batch)
        if step.num_tokens == 0:
            return Mode.TP
        mode = self.shift_policy.choose(step)
        rank_consensus_checker.assert_same("sglang_shift step %s in %s", step, mode)
        self.shift_steps[mode] += 1
        self.shift_tokens[mode] += step.num_tokens
        self.shift_switches += self.shift_last_mode not in (None, mode)
        self.shift_last_mode = mode
        return mode

    def step_state(self, batch: ScheduleBatch) -> StepState:
        """What the policy sees; only what is identical on every rank may enter."""
        mode = batch.forward_mode
        if mode.is_idle() or mode.is_prebuilt():
            tokens = prefill = 0
        elif mode.is_extend():
            tokens = batch.extend_num_tokens
            prefill = tokens - len(batch.decoding_reqs or ())  # a mixed step decodes these, a token each
        else:
            tokens, prefill = batch.batch_size(), 0
        return StepState(tokens, prefill, self.running_batch.batch_size(), len(self.waiting_queue))

    def init_internal_state(self) -> None:
        """``/server_info`` carries live counters."""
        self.internal_state = ShiftInternalState(scheduler=self, record_step_time=sglang_scheduler.RECORD_STEP_TIME)

    def save_remote_model(self, **kwargs: Any) -> None:
        """Refused; SGLang's RPC answers with the reason.

        Raises:
            Refused: always.
        """
        raise Refused(EXPORT_REFUSED)

    save_sharded_model = save_remote_model

    def shift_state(self) -> dict[str, Any]:
        """Live counters of this rank, for ``/server_info``."""
        exchange = region.groups.exchange
        report = self.tp_worker.model_runner.weight_report
        return {
            "sp_size": self.shift_config.sp_size,
            "base_tp_size": region.groups.layout.base_tp_size,
            "policy": self.shift_policy.describe(),
            "steps": {mode.value: n for mode, n in self.shift_steps.items()},
            "tokens": {mode.value: n for mode, n in self.shift_tokens.items()},
            "switches": self.shift_switches,
            "exchanges": exchange.calls,
            "exchanged_bytes": exchange.bytes_sent,
            "weight_bytes": report.total,
            "weight_bytes_beyond_base": report.beyond_base,
        }


class ShiftInternalState(SchedulerInternalStateController):
    """SGLang's internal state with a ``shift`` entry, and the threshold among what can be updated."""

    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        """SGLang's answer and our counters."""
        output = super().get_internal_state(recv_req)
        output.internal_state["shift"] = self.scheduler.shift_state()
        return output

    def _update_handlers(self) -> dict[str, Any]:
        # SGLang's request carries numbers only, so the threshold stands for all: 0 is SP, a huge one TP.
        handler = internal_state._UpdateHandler(self._validate_threshold, self._apply_threshold)
        return {**super()._update_handlers(), "shift_threshold": handler}

    def _validate_threshold(self, key: str, value: Any) -> None:
        if self.scheduler.shift_config.policy != "tokens":
            raise internal_state.UpdateRejected(f"Updating {key} needs --shift-policy tokens.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise internal_state.UpdateRejected(f"{key} must be 0 or more tokens, got {value!r}.")

    def _apply_threshold(self, key: str, value: int) -> dict[str, Any]:
        # Every rank handles the request in the same iteration, so their policies change together.
        self.scheduler.set_policy(replace(self.scheduler.shift_config, threshold=value))
        return {key: value}


def run_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """What each rank's process runs: SGLang's own function, on our scheduler where asked for.

    Without our flags it is SGLang's, untouched.
    """
    if shift_config_of(server_args) is not None:
        seams.install()
    sglang_scheduler.run_scheduler_process(server_args, *args, **kwargs)
