"""A server in which rank 1 chooses another mode than rank 0, as no policy of the package could.

python test/diverging_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from sglang_shift.modes import Mode, ShiftPolicy, StepState

TRIGGER = 77
"""Tokens of the prompt from which on the ranks differ."""


class Diverging(ShiftPolicy):
    """TP; but SP on rank 1, for a prompt of so many tokens."""

    def choose(self, step: StepState) -> Mode:
        from sglang.srt.runtime_context import get_parallel

        return Mode.SP if get_parallel().tp_rank == 1 and step.num_prefill_tokens == TRIGGER else Mode.TP


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang_shift import scheduler

    scheduler.make_policy = lambda config, costs, chunk: Diverging()
    scheduler.run_scheduler_process(*args, **kwargs)


if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils import kill_process_tree
    from sglang_shift.launch_server import resolve
    from sglang_shift.server_args import prepare_server_args

    server_args = prepare_server_args(sys.argv[1:])
    resolve(server_args)
    try:
        launch_server(server_args, run_scheduler_process_func=run_scheduler_process)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
