"""Runs a server whose ranks capture and replay the recorded graphs of test/support/recorded_graphs.py.

python test/support/recorded_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import sys
from typing import Any

from sglang_shift.runtime import scheduler

run_rank = scheduler.run_scheduler_process


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from recorded_graphs import record_graphs

    record_graphs()
    run_rank(*args, **kwargs)


if __name__ == "__main__":
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang_shift import launch_server
    from sglang_shift.platforms import cpu

    add_attention_backend_choices(["recorded"])
    cpu.without_graphs = lambda config: config  # the platform would switch graphs off, because it cannot capture any
    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
