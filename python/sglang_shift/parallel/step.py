"""Holds the context of the step that runs: its mode, its topology, and how its rows are divided.

SGLang calls our functions (:mod:`sglang_shift.layers`), and passes no argument of ours. So they get the step from
:func:`current`. A rank runs one forward at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.runtime_context import get_forward

from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
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
        forwards: The methods that run in place of SGLang's, if the step is sharded.
        has_exit: Whether the step leaves the token-sharded region. It is False for a graph of the layers alone.
        pipelined: Whether attention modules exchange their heads group by group, if they can.
        num_tokens: Rows that entered the region, with rows that pad the step to the size of a graph. The entry sets it.
        inside: Whether the step is inside of the region: between the embedding and the LM head.
        left: Whether the step has left the region.
        in_attention: Whether the rows are all tokens now, with this rank's heads: between the two exchanges of a layer.
        gathered: The last rows that were gathered inside of the region: this rank's rows, and all rows.
        exit_plan: The plan of the exit; None if all rows leave. The entry sets it.
    """

    mode: Mode
    topology: Topology
    batch: Any
    forwards: Forwards = field(default_factory=Forwards)
    has_exit: bool = True
    pipelined: bool = False
    num_tokens: int = 0
    inside: bool = False
    left: bool = False
    in_attention: bool = False
    gathered: tuple[torch.Tensor, torch.Tensor] | None = None
    exit_plan: ExitPlan | None = None

    @property
    def sharded(self) -> bool:
        """Whether each rank carries 1/S of the tokens."""
        return self.mode is Mode.SP

    def enter(self) -> None:
        """Mark the step as inside of the region. SGLang's code asks its own flag ``sp_active``."""
        self.inside = True
        get_forward().set("sp_active", True)

    def leave(self) -> None:
        """Mark the step as outside of the region."""
        self.inside = self.in_attention = False
        self.left = True
        self.gathered = None
        get_forward().set("sp_active", False)


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
        with ExitStack() as stack:
            if step.sharded:
                stack.enter_context(step.forwards.installed())
            yield step
    finally:
        _current.reset(token)
        get_forward().set("sp_active", False)


def current_step() -> Step:
    """The step that runs, for code that only runs in a step."""
    step = _current.get()
    assert step is not None, "this code runs in a step only"
    return step
