"""Runs a server in which SP steps compute something else than TP steps, by a small fault in one place.

python test/support/faulty_server.py --port N [the flags of launch_server]

The environment variable FAULT names the fault.
"""

from __future__ import annotations

import os
from typing import Any

from serving import serve

FAULT = "FAULT"
PERCENT = 1.01


def weight(runner: Any) -> None:
    """Of the QKV weight of layer 1, the first query row that another rank has is 1 % too large. TP does not read it."""
    qkv = next(p for p in runner.sp_model.projections if p.linear is runner.model.model.layers[1].self_attn.qkv_proj)
    other = 1 - runner.topology.sp_index
    qkv.base.weight[other * qkv.base.outputs // 2].mul_(PERCENT)


def last_mlp(runner: Any) -> None:
    """The output of the last MLP is 1 % too large."""
    down = runner.model.model.layers[-1].mlp.down_proj
    projection = next(p for p in runner.sp_model.projections if p.linear is down)
    forward = projection.forward
    projection.forward = lambda x, step: forward(x, step) * PERCENT


FAULTS = {fault.__name__: fault for fault in (weight, last_mlp)}


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang_shift.runtime import model_runner, scheduler

    load_model = model_runner.ShiftModelRunner.load_model

    def load_with_fault(self: Any) -> None:
        load_model(self)
        FAULTS[os.environ[FAULT]](self)

    model_runner.ShiftModelRunner.load_model = load_with_fault  # type: ignore[method-assign]
    scheduler.run_scheduler_process(*args, **kwargs)


if __name__ == "__main__":
    serve(run_scheduler_process)
