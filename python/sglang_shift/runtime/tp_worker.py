"""The TP worker is SGLang's worker with our model runner, and with a stopwatch around each step."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.runtime_context import get_schedule

from sglang_shift.runtime.agreement import from_all_ranks
from sglang_shift.runtime.model_runner import ShiftModelRunner
from sglang_shift.runtime.stopwatch import Lap, Stopwatch
from sglang_shift.seams import overrides

logger = logging.getLogger(__name__)

# SGLang's exports write whole parameter buffers. Our parameters are views, and some have strides.
EXPORT_REFUSED = (
    "weights of a server with sequence parallelism cannot be exported shard by shard, because its TP shards "
    "are views of larger weights; export them from a server without --sp-size and --enable-shift-parallel"
)


class ShiftTpModelWorker(TpModelWorker):
    """SGLang's TP worker. Its forwards run in the mode that the scheduler chose.

    Attributes:
        last_lap: The time of the last step; None before the first step.
    """

    last_lap: Lap | None = None

    @overrides("Our method measures the time of the step.")
    def forward_batch_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Run and time one step: model, LM head and sampling."""
        with self.stopwatch.lap() as self.last_lap:
            return super().forward_batch_generation(*args, **kwargs)

    @overrides("Our method measures the time of the step.")
    def forward_batch_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """Run and time one step of a model that pools."""
        with self.stopwatch.lap() as self.last_lap:
            return super().forward_batch_embedding(*args, **kwargs)

    @overrides("Our method refuses the transfer, because SGLang's method would send views of the base weights.")
    def send_weights_to_remote_instance(self, recv_req: Any) -> tuple[bool, str]:
        return False, EXPORT_REFUSED

    @overrides("Our method refuses the transfer before a rank waits for the others, or ends for a port too few.")
    def init_weights_send_group_for_remote_instance(self, recv_req: Any) -> tuple[bool, str]:
        return False, EXPORT_REFUSED

    @overrides("Our method answers with an error where SGLang's would end the rank.")
    def load_lora_adapter_from_tensors(self, recv_req: Any) -> LoRAUpdateOutput:
        """Load an adapter on all ranks, or on none."""
        try:
            own = super().load_lora_adapter_from_tensors(recv_req)
        except Exception as error:  # this rank cannot read its tensors, or they have other checksums
            message = f"the tensors of adapter {recv_req.lora_name!r} do not load: {error!r}"
            logger.error("sglang_shift: %s", message)
            own = LoRAUpdateOutput(success=False, error_message=message)
        loaded = [bool(number) for (number,) in from_all_ranks([own.success])]
        if own.success and not all(loaded):
            self.model_runner.unload_lora_adapter(recv_req.to_ref())
            failed = f"rank {loaded.index(False)} could not load the adapter; its log has the reason"
            return LoRAUpdateOutput(success=False, error_message=failed)
        return own

    @overrides("Our method builds our model runner.")
    def _init_model_runner(self) -> None:
        self.stopwatch = Stopwatch()
        self._model_runner = ShiftModelRunner(
            model_config=self.model_config,
            mem_fraction_static=get_schedule().mem_fraction_static,
            gpu_id=self.gpu_id,
            nccl_port=self.nccl_port,
            server_args=self.server_args,
            is_draft_worker=self.is_draft_worker,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            memory_pool_config=self.memory_pool_config,
            draft_attention_backend=self.draft_attention_backend,
            draft_model_idx=None,
            load_group=self.load_group,
        )
