"""Provides offline inference: SGLang's ``Engine`` with Shift Parallelism."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglangEngine

from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.models.demo import demo_model_path
from sglang_shift.runtime.scheduler import run_scheduler_process
from sglang_shift.runtime.tokenizer_manager import init_tokenizer_manager
from sglang_shift.seams import check_sources, extends
from sglang_shift.start_up_log import LAUNCHER_MESSAGES, leave_out


@extends(
    "sglang.srt.entrypoints.engine:Engine",
    "Our engine adds our flags, our ranks and our tokenizer manager to offline inference.",
)
class Engine(SglangEngine):
    """``sglang.Engine``, with a keyword argument for each of our flags as well.

    For example, ``Engine(tp_size=2, enable_shift_parallel=True)``. Without ``model_path``, it serves the demo model.

    Raises:
        ShiftError: the settings are refused, or the seams do not fit the installed SGLang.
    """

    server_args_class = ShiftServerArgs
    run_scheduler_process_func = staticmethod(run_scheduler_process)
    init_tokenizer_manager_func = staticmethod(init_tokenizer_manager)

    def __init__(self, **kwargs: Any) -> None:
        check_sources()
        leave_out(LAUNCHER_MESSAGES)
        if "server_args" not in kwargs:
            kwargs.setdefault("model_path", demo_model_path())
        super().__init__(**kwargs)
