"""Provides offline inference: SGLang's ``Engine`` with Shift Parallelism."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglangEngine

from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.models.demo import demo_model_path
from sglang_shift.resolution import shift_config_of
from sglang_shift.runtime.controller import run_controller_process
from sglang_shift.runtime.detokenizer import run_detokenizer_process
from sglang_shift.runtime.instance_requests import carry_messages
from sglang_shift.runtime.process_watch import ProcessWatch
from sglang_shift.runtime.scheduler import run_scheduler_process
from sglang_shift.runtime.tokenizer_manager import init_tokenizer_manager
from sglang_shift.seams import check_sources, extends, overrides, put_in_place
from sglang_shift.start_up_log import LAUNCHER_MESSAGES, leave_out

WAITS_AFTER_A_CRASH = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")
"""Variables of SGLang's for what a server does before it ends, if one of its processes has died.

SGLang looks at ranks that are alive, and waits a minute for dumps of GPUs. Meanwhile nobody gets an answer. In a server
without instances the other ranks die as well, and SGLang does not wait. Ranks of other instances stay alive.
"""


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

    @classmethod
    @overrides("With instances, our method starts their controller beside the ranks.")
    def _launch_scheduler_processes(cls, server_args: Any, port_args: Any, *args: Any, **kwargs: Any) -> Any:
        result, processes = super()._launch_scheduler_processes(server_args, port_args, *args, **kwargs)
        config = shift_config_of(server_args)
        if config is not None and config.instances:
            for variable in WAITS_AFTER_A_CRASH:
                os.environ.setdefault(variable, "0")
            put_in_place(ProcessWatch)
            carry_messages()
            controller = multiprocessing.Process(target=run_controller_process, args=(server_args, port_args))
            controller.start()
            processes.append(controller)
            result.all_child_pids.append(controller.pid)
        return result, processes

    @classmethod
    @overrides("With instances, our method starts a detokenizer that tells ranks what it has read.")
    def _launch_detokenizer_subprocesses(
        cls, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
    ) -> Any:
        config = shift_config_of(server_args)
        if config is not None and config.instances:
            run_detokenizer_process_func = run_detokenizer_process
        return super()._launch_detokenizer_subprocesses(server_args, port_args, run_detokenizer_process_func)


@extends(
    "sglang.srt.entrypoints.http_server:Engine",
    "SGLang's server starts its processes by the class of this name; ours also starts the controller of instances.",
)
def serve_from_our_engine() -> None:
    """Let SGLang's HTTP server start its processes as our offline engine does: with the controller of instances."""
    from sglang.srt.entrypoints import http_server

    http_server.Engine = Engine
