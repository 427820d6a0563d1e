"""Runs a server in which rank 1 chooses another mode than rank 0. No policy of the package can do this.

python test/support/diverging_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

from typing import Any

from serving import serve
from sglang_shift.modes import Mode, ShiftPolicy, StepState

TRIGGER = 77
"""The ranks choose different modes for a prompt of this number of tokens."""


class Diverging(ShiftPolicy):
    """Chooses TP. But on rank 1 it chooses SP for a prompt of :data:`TRIGGER` tokens."""

    def choose(self, step: StepState) -> Mode:
        from sglang.srt.runtime_context import get_parallel

        return Mode.SP if get_parallel().tp_rank == 1 and step.num_prefill_tokens == TRIGGER else Mode.TP


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang_shift.runtime import scheduler

    scheduler.make_policy = lambda config, costs, chunk: Diverging()
    scheduler.run_scheduler_process(*args, **kwargs)


if __name__ == "__main__":
    serve(run_scheduler_process)
