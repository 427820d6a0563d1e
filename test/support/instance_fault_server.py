"""Runs a server with instances, of which one rank fails in changes of its level.

python test/support/instance_fault_server.py --port N [the flags of launch_server]

The environment variable FAULTS has a phase and a fault for each change, such as "plan memory, exchange kill".
"""

from __future__ import annotations

import os
import sys
from typing import Any

from sglang_shift.runtime import scheduler

FAULTS = "FAULTS"
run_rank = scheduler.run_scheduler_process


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from instance_faults import plant
    from sglang_shift.runtime.level_change import LevelChange

    faults = [text.split() for text in os.environ[FAULTS].split(",")]
    run = LevelChange.run

    def run_with_fault(self: Any) -> Any:
        if faults:
            plant(self.scheduler, *faults.pop(0))
        return run(self)

    LevelChange.run = run_with_fault  # type: ignore[method-assign]
    run_rank(*args, **kwargs)


if __name__ == "__main__":
    from sglang_shift import launch_server

    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
