"""Runs a server whose ranks switch the mode at every step, and count and check what they do.

    python test/support/instrumented_server.py --port N [the flags of launch_server]

Only the policy is replaced. The counts come from wrappers of SGLang's groups in each rank.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from serving import serve
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policy.builtin import TokenThreshold

COUNTS: dict[str, Counter[str]] = {"tp": Counter(), "sp": Counter()}


class Alternating(ShiftPolicy):
    """Chooses by a threshold that changes at every step: all steps are above it, then no step is above it."""

    def __init__(self) -> None:
        self.step = 0

    def choose(self, step: StepState) -> Mode:
        self.step += 1
        return TokenThreshold(0 if self.step % 2 else 10**9).choose(step)

    def describe(self) -> str:
        return "alternating"


def count_collectives() -> None:
    """Count the collectives of the model's forwards, by mode."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang_shift.runtime.model_runner import ShiftModelRunner

    running: list[str] = []
    scheduler_thread = threading.current_thread()  # the rank-consensus checker communicates from another thread
    forward = ShiftModelRunner.forward

    def counted_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        running.append(self.mode.value)
        COUNTS[running[-1]]["forwards"] += 1
        try:
            return forward(self, *args, **kwargs)
        finally:
            running.pop()

    ShiftModelRunner.forward = counted_forward  # type: ignore[method-assign]

    def counted(name: str) -> None:
        function = getattr(GroupCoordinator, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if running and threading.current_thread() is scheduler_thread:
                COUNTS[running[-1]][name] += 1
            return function(*args, **kwargs)

        setattr(GroupCoordinator, name, wrapper)

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor"):
        counted(name)


def weights_facts(scheduler: Any) -> dict[str, Any]:
    """Return how many TP weights are views of the base weights, and how much memory the parameters take."""
    import torch

    base = scheduler.tp_worker.model_runner.base_weights
    topology, facts = base.topology, {"projections": len(base.bases), "views": 0, "values": 0}
    for linear, assembled in base.bases.items():
        weight, whole = linear.weight.data, assembled.weight
        dim = 0 if weight.shape[1] == whole.shape[1] else 1
        mine = whole.narrow(dim, topology.sp_index * weight.shape[dim], weight.shape[dim])
        facts["views"] += weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        facts["values"] += torch.equal(weight, mine)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.model.parameters()}
    facts["parameter_storage_bytes"] = sum(storages.values())
    return facts


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang_shift.runtime import scheduler

    scheduler.make_policy = lambda config, costs, chunk: Alternating()
    count_collectives()
    stock_state = scheduler.ShiftScheduler.shift_state

    def shift_state(self: Any) -> dict[str, Any]:
        counts = {mode: dict(counter) for mode, counter in COUNTS.items()}
        return {**stock_state(self), "counts": counts, "weights": weights_facts(self)}

    scheduler.ShiftScheduler.shift_state = shift_state  # type: ignore[method-assign]
    scheduler.run_scheduler_process(*args, **kwargs)


if __name__ == "__main__":
    serve(run_scheduler_process)
