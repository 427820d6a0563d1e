"""Runs a server that takes any --dcp-size, without the check that the ranks of a group hold the same KV heads.

python test/support/unchecked_shards_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import sys
from typing import Any

from sglang_shift.runtime import scheduler

RUN = scheduler.run_scheduler_process


def take_any_size() -> None:
    from sglang_shift.args import dcp_size
    from sglang_shift.models import token_shards

    for module in (dcp_size, token_shards):
        module.check_token_shards = lambda heads, ranks, count: None  # type: ignore[attr-defined]


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    take_any_size()
    RUN(*args, **kwargs)


if __name__ == "__main__":
    from sglang_shift import launch_server

    take_any_size()
    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
