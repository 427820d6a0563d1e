"""Runs a server whose chunks may leave out blocks after short prefixes, so that tests need no long prompts.

python test/support/sparse_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import sys
from typing import Any

from sglang_shift.runtime import scheduler, sparse_prefill

MIN_PREFIX = 512
RUN = scheduler.run_scheduler_process


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    sparse_prefill.MIN_PREFIX = MIN_PREFIX
    RUN(*args, **kwargs)


if __name__ == "__main__":
    from sglang_shift import launch_server

    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
