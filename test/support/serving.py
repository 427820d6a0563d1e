"""Runs SGLang's HTTP server with ranks of the test's own. Each server module in this folder ends with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def serve(run_scheduler_process: Callable[..., Any]) -> None:
    """Serve with the flags of the command line until the server is stopped. At exit no process is left behind.

    Args:
        run_scheduler_process: The function that each rank's process runs.
    """
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree
    from sglang_shift.args.server_args import prepare_server_args
    from sglang_shift.launch_server import resolve

    server_args = prepare_server_args(sys.argv[1:])
    resolve(server_args)
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler_process)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
