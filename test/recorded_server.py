"""A server whose ranks capture and replay recorded graphs, as test/recorded_graphs.py has them.

python test/recorded_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import os
import sys
from typing import Any


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from recorded_graphs import record_graphs
    from sglang_shift import scheduler

    record_graphs()
    scheduler.run_scheduler_process(*args, **kwargs)


if __name__ == "__main__":
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree
    from sglang_shift.launch_server import resolve
    from sglang_shift.server_args import prepare_server_args

    add_attention_backend_choices(["recorded"])
    server_args = prepare_server_args(sys.argv[1:])
    resolve(server_args)
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler_process)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
