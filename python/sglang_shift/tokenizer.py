"""The tokenizer manager: puts each request's steps by mode into its ``meta_info``."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_stock
from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_shift.events import META_INFO_KEY as KEY


class ShiftSteps:
    """``meta_info["shift_steps"] = {"tp": n, "sp": n}`` for finished requests.

    SGLang would make a list of it, one entry a token, and slice that in streams.
    """

    def update_request_meta_info(
        self, meta_info: dict[Any, Any], state: Any, customized_info: dict[str, Any], index: int, finish_reason: Any
    ) -> None:
        """As SGLang's, for what else there is; ours directly."""
        rest = {key: values for key, values in customized_info.items() if key != KEY}
        super().update_request_meta_info(meta_info, state, rest, index, finish_reason)  # type: ignore[misc]
        if steps := customized_info[KEY][index] if KEY in customized_info else None:
            meta_info[KEY] = steps[0]


class ShiftTokenizerManager(ShiftSteps, TokenizerManager):
    """SGLang's tokenizer manager, in the main process."""


class ShiftTokenizerWorker(ShiftSteps, TokenizerWorker):
    """SGLang's tokenizer manager with ``--tokenizer-worker-num`` above 1, in each worker process."""


init_tokenizer_manager = partial(init_stock, TokenizerManagerClass=ShiftTokenizerManager)
