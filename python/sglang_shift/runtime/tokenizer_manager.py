"""The tokenizer manager: refuses what would end the ranks; each request's steps by mode in its ``meta_info``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_stock
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_shift.observe.events import META_INFO_KEY as KEY
from sglang_shift.runtime.admission import (
    NO_TOKENS,
    check_folder,
    check_labels,
    check_logging,
    check_message,
    check_samples,
    check_values,
    fit_types,
)
from sglang_shift.seams import overrides


class ShiftSteps(TokenizerManager):
    """``meta_info["shift_steps"] = {"tp": n, "sp": n}``, an entry for each mode, for finished requests.

    SGLang would make a list of it, one entry a token, and slice that in streams.
    """

    @overrides("adds the steps of each request by mode")
    def update_request_meta_info(
        self, meta_info: dict[Any, Any], state: Any, customized_info: dict[str, Any], index: int, finish_reason: Any
    ) -> None:
        """As SGLang's, for what else there is; ours directly."""
        rest = {key: values for key, values in customized_info.items() if key != KEY}
        super().update_request_meta_info(meta_info, state, rest, index, finish_reason)
        if steps := customized_info[KEY][index] if KEY in customized_info else None:
            meta_info[KEY] = steps[0]


class CheckedRequests(TokenizerManager):
    """What would end a rank is answered with an error, and reaches none (:mod:`sglang_shift.runtime.admission`)."""

    @overrides("refuses more samples than can be made, and unknown labels")
    def generate_request(self, obj: Any, request: Any = None) -> AsyncGenerator[Any]:
        """As SGLang's, if the request can be multiplied as it asks to be, and counted."""
        check_samples(obj)
        check_labels(getattr(obj, "custom_labels", None))
        return super().generate_request(obj, request)

    @overrides("refuses a request without tokens")
    def _validate_one_request(self, obj: Any, input_ids: list[int] | None) -> None:
        """As SGLang's, if the request has tokens."""
        super()._validate_one_request(obj, input_ids)
        rows = getattr(obj, "input_embeds", None)
        # A session may have tokens from before; the processor of a multimodal model may make them later.
        later = getattr(obj, "session_params", None) or obj.contains_mm_input()
        if not (input_ids if rows is None else rows) and not later:
            raise ValueError(NO_TOKENS)

    @overrides("refuses values of another type, and those that fit no tensor")
    def _create_tokenized_object(self, *args: Any, **kwargs: Any) -> Any:
        """As SGLang's, if all values fit."""
        tokenized = super()._create_tokenized_object(*args, **kwargs)
        fit_types(tokenized)
        check_values(tokenized, self.model_config)
        return tokenized

    @overrides("refuses a folder that cannot be written")
    async def start_profile(self, req: Any = None) -> Any:
        """As SGLang's, if the profile can be written."""
        check_folder(None if req is None else req.output_dir)
        return await super().start_profile(req)

    @overrides("refuses an unknown level")
    def configure_logging(self, obj: Any) -> None:
        """As SGLang's, if there is such a level."""
        check_logging(obj.log_requests_level)
        super().configure_logging(obj)

    @overrides("refuses what the ranks could not read")
    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """As SGLang's, if the ranks can read it."""
        check_message(obj)
        super()._dispatch_to_scheduler(obj)

    @overrides("refuses what the ranks could not read")
    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        """As SGLang's, if the ranks can read it."""
        check_message(obj)
        await super()._async_dispatch_to_scheduler(obj)


class ShiftTokenizerManager(ShiftSteps, CheckedRequests):
    """SGLang's tokenizer manager, in the main process."""


class ShiftTokenizerWorker(ShiftSteps, CheckedRequests, TokenizerWorker):
    """SGLang's tokenizer manager with ``--tokenizer-worker-num`` above 1, in each worker process."""


init_tokenizer_manager = partial(init_stock, TokenizerManagerClass=ShiftTokenizerManager)
