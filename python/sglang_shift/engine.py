"""Offline inference: SGLang's ``Engine`` with Shift Parallelism."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglangEngine

from sglang_shift import seams
from sglang_shift.demo import demo_model_path
from sglang_shift.scheduler import run_scheduler_process
from sglang_shift.server_args import ShiftServerArgs
from sglang_shift.tokenizer import init_tokenizer_manager


class Engine(SglangEngine):
    """``sglang.Engine`` with the keyword arguments of our flags as well.

    ``Engine(tp_size=2, enable_shift_parallel=True)``; without ``model_path``, the demo model.

    Raises:
        ShiftError: refused settings, or an SGLang that this package was not written against.
    """

    server_args_class = ShiftServerArgs
    run_scheduler_process_func = staticmethod(run_scheduler_process)
    init_tokenizer_manager_func = staticmethod(init_tokenizer_manager)

    def __init__(self, **kwargs: Any) -> None:
        seams.check_sources()
        if "server_args" not in kwargs:
            kwargs.setdefault("model_path", demo_model_path())
        super().__init__(**kwargs)
