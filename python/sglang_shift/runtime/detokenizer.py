"""The detokenizer of a server with instances: SGLang's, which also tells ranks what it has read."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as run_stock
from sglang.utils import TypeBasedDispatcher

from sglang_shift.runtime.process_watch import end_with_parent
from sglang_shift.runtime.read_receipts import ReceiptReq, ReceiptWriter
from sglang_shift.seams import extends, overrides, relies_on


class InstanceDetokenizer(DetokenizerManager):
    """SGLang's detokenizer, with receipts."""

    @overrides("Our method lets the detokenizer also answer requests for receipts.")
    @relies_on(
        "sglang.srt.managers.multi_tokenizer_mixin:MultiDetokenizerRouter.event_loop",
        "A router of several detokenizers sends messages on in the order in which it reads them.",
    )
    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher([(ReceiptReq, ReceiptWriter().write)])


@extends(
    "sglang.srt.managers.detokenizer_manager:run_detokenizer_process",
    "SGLang makes the detokenizer of the class that is given.",
)
def run_detokenizer_process(server_args: Any, port_args: Any) -> None:
    """Run the detokenizer in a process of its own, until the server is stopped."""
    end_with_parent()
    run_stock(server_args, port_args, InstanceDetokenizer)
