"""The tokenizer manager refuses requests that would end a rank, and adds steps by mode to ``meta_info``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_stock
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_shift.observe.events import META_INFO_KEY, SPARSE_KEY
from sglang_shift.runtime.admission import (
    NO_TOKENS,
    check_folder,
    check_kind,
    check_labels,
    check_logging,
    check_message,
    check_samples,
    check_values,
    convert_types,
)
from sglang_shift.runtime.instance_requests import InstanceRequests
from sglang_shift.runtime.operator_requests import (
    check_profile,
    check_recorder,
    check_sleep,
    check_tags,
    lacks_tensors,
)
from sglang_shift.seams import overrides

KEYS = (META_INFO_KEY, SPARSE_KEY)


class ShiftSteps(TokenizerManager):
    """Adds entries to the ``meta_info`` of finished requests.

    These are ``{"shift_steps": {"tp": n, "sp": n}}``, with a number for each mode, and ``shift_sparse`` with what the
    request left out. SGLang would make each a list with one entry for each token, and would slice this list in streams.
    """

    @overrides("Our method adds the steps of each request by mode, and what it left out, to its meta_info.")
    def update_request_meta_info(
        self, meta_info: dict[Any, Any], state: Any, customized_info: dict[str, Any], index: int, finish_reason: Any
    ) -> None:
        """Let SGLang add all other entries, and add ours directly."""
        rest = {key: values for key, values in customized_info.items() if key not in KEYS}
        super().update_request_meta_info(meta_info, state, rest, index, finish_reason)
        for key in KEYS:
            if entry := customized_info[key][index] if key in customized_info else None:
                meta_info[key] = entry[0]


class RequestChecks(TokenizerManager):
    """Answers a request that would end a rank with an error, and sends it to no rank.

    The checks are in :mod:`sglang_shift.runtime.admission` and :mod:`sglang_shift.runtime.operator_requests`.
    """

    @overrides("Our method refuses requests for too many samples, with unknown labels, or for what the model is not.")
    def generate_request(self, obj: Any, request: Any = None) -> AsyncGenerator[Any]:
        check_samples(obj)
        check_labels(getattr(obj, "custom_labels", None))
        check_kind(obj, self.is_generation)
        return super().generate_request(obj, request)

    @overrides("Our method refuses a request without tokens.")
    def _validate_one_request(self, obj: Any, input_ids: list[int] | None) -> None:
        super()._validate_one_request(obj, input_ids)
        rows = getattr(obj, "input_embeds", None)
        # A session may have tokens of earlier requests. A multimodal model's processor may make tokens later.
        may_get_tokens = getattr(obj, "session_params", None) or obj.contains_mm_input()
        if not (input_ids if rows is None else rows) and not may_get_tokens:
            raise ValueError(NO_TOKENS)

    @overrides("Our method refuses values of a wrong type, and values that fit no tensor.")
    def _create_tokenized_object(self, *args: Any, **kwargs: Any) -> Any:
        tokenized = super()._create_tokenized_object(*args, **kwargs)
        convert_types(tokenized)
        check_values(tokenized, self.model_config)
        return tokenized

    @overrides("Our method refuses a folder that cannot be written.")
    async def start_profile(self, req: Any = None) -> Any:
        check_folder(None if req is None else req.output_dir)
        if req is not None:
            check_profile(req)
        return await super().start_profile(req)

    @overrides("Our method refuses to record experts on a server without a recorder.")
    async def start_expert_distribution_record(self) -> None:
        check_recorder()
        await super().start_expert_distribution_record()

    @overrides("Our method refuses to record experts on a server without a recorder.")
    async def stop_expert_distribution_record(self) -> None:
        check_recorder()
        await super().stop_expert_distribution_record()

    @overrides("Our method refuses to record experts on a server without a recorder.")
    async def dump_expert_distribution_record(self) -> None:
        check_recorder()
        await super().dump_expert_distribution_record()

    @overrides("Our method refuses memory that does not exist.")
    async def release_memory_occupation(self, obj: Any, request: Any = None) -> None:
        check_tags(obj.tags)
        await super().release_memory_occupation(obj, request)

    @overrides("Our method refuses memory that does not exist.")
    async def resume_memory_occupation(self, obj: Any, request: Any = None) -> None:
        check_tags(obj.tags)
        await super().resume_memory_occupation(obj, request)

    @overrides("Our method refuses a delay for which no rank can sleep.")
    async def slow_down(self, obj: Any, request: Any = None) -> None:
        check_sleep(obj.forward_sleep_time)
        await super().slow_down(obj, request)

    @overrides("Our method refuses an update without tensors for each rank.")
    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        if lack := lacks_tensors(obj):
            return False, lack
        return await super().update_weights_from_tensor(obj, request)

    @overrides("Our method refuses an adapter without tensors for each rank.")
    async def load_lora_adapter_from_tensors(self, obj: Any, _: Any = None) -> LoRAUpdateOutput:
        if lack := lacks_tensors(obj):
            return LoRAUpdateOutput(success=False, error_message=lack)
        return await super().load_lora_adapter_from_tensors(obj, _)

    @overrides("Our method refuses a group without a name.")
    async def init_weights_update_group(self, obj: Any, request: Any = None) -> tuple[bool, str]:
        if not obj.group_name:
            return False, "group_name is empty; give the group a name"
        return await super().init_weights_update_group(obj, request)

    @overrides("Our method refuses an unknown logging level.")
    def configure_logging(self, obj: Any) -> None:
        check_logging(obj.log_requests_level)
        super().configure_logging(obj)

    @overrides("Our method refuses a message that the ranks could not read.")
    def _dispatch_to_scheduler(self, obj: Any) -> None:
        check_message(obj)
        super()._dispatch_to_scheduler(obj)

    @overrides("Our method refuses a message that the ranks could not read.")
    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        check_message(obj)
        await super()._async_dispatch_to_scheduler(obj)


class ShiftTokenizerManager(ShiftSteps, RequestChecks, InstanceRequests):
    """SGLang's tokenizer manager with all additions, for the main process."""


class ShiftTokenizerWorker(ShiftSteps, RequestChecks, InstanceRequests, TokenizerWorker):
    """SGLang's tokenizer worker with all additions. If ``--tokenizer-worker-num`` is above 1, each process has one."""


init_tokenizer_manager = partial(init_stock, TokenizerManagerClass=ShiftTokenizerManager)
