"""The context of the step that runs: its mode, its topology, and how its rows are divided.

SGLang calls the functions that we replace (:mod:`sglang_shift.runtime.layernorm_sp`), and passes no argument of ours.
So they get the step from :func:`current`. A rank runs one forward at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.runtime_context import get_forward

from sglang_shift.modes import Mode
from sglang_shift.parallel.topology import Topology


@dataclass(frozen=True)
class ExitPlan:
    """The plan of an exit: which rows leave the region, and their places in the all-gather.

    All indices are on the device.

    Attributes:
        rows_per_rank: The number of rows that each rank sends. An all-gather has equal parts, so this is the largest
            number of rows that leave on any rank.
        local_rows: The rows that leave on this rank, ``rows_per_rank`` or fewer. They are counted from the first row
            of this rank.
        rows: The rows that leave on all ranks, as numbers from 0 to T - 1.
        places: The index of each of ``rows`` in the result of the all-gather.
    """

    rows_per_rank: int
    local_rows: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class Step:
    """One forward of the model.

    Attributes:
        mode: The mode of the step.
        topology: The topology of the step.
        batch: SGLang's forward batch.
        has_exit: Whether the step leaves the token-sharded region. It is False for a graph of the layers alone.
        num_tokens: Rows that entered the region, with rows that pad the step to the size of a graph. The entry sets it.
        scattered_by_embedding: Whether the embedding has already kept only this rank's rows.
        exit_plan: The plan of the exit; None if all rows leave. The entry sets it.
    """

    mode: Mode
    topology: Topology
    batch: Any
    has_exit: bool = True
    num_tokens: int = 0
    scattered_by_embedding: bool = False
    exit_plan: ExitPlan | None = None

    @property
    def sharded(self) -> bool:
        """Whether each rank carries 1/S of the tokens."""
        return self.mode is Mode.SP


_current: ContextVar[Step | None] = ContextVar("the step that runs", default=None)


def current() -> Step | None:
    """The step that runs; None outside of a step. SGLang's warm-up and its own graph captures are TP without a step."""
    return _current.get()


@contextmanager
def run_step(step: Step) -> Iterator[Step]:
    """Inside of this context, ``step`` is the step that runs.

    Raises:
        RuntimeError: another step runs. A nested step would lose the state of the outer one.
    """
    if (outer := _current.get()) is not None:
        raise RuntimeError(f"a step in {step.mode} begins inside of a step in {outer.mode}; end that one first")
    get_forward().set("sp_active", False)
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)
        get_forward().set("sp_active", False)
