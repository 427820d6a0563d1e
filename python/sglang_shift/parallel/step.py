"""The context of a step: the one forward that runs, its mode, its topology, and how its rows are divided.

SGLang calls the functions that we replace (:mod:`sglang_shift.runtime.layernorm_sp`) without arguments of
ours: they find the step by :func:`current`. A rank runs one forward at a time.
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
class Exit:
    """Which rows leave the region, and their way through the all-gather. All indices are on the device.

    Attributes:
        most: Rows that each rank sends: as many as the rank with the most wanted ones, as an
            all-gather has equal parts.
        mine: This rank's wanted rows, ``most`` or fewer, counted from its first row.
        rows: All wanted rows, of the step's T.
        places: Where each of ``rows`` is in what the all-gather receives.
    """

    most: int
    mine: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class Step:
    """One forward of the model.

    Attributes:
        mode: How it runs.
        topology: The groups that it runs over.
        batch: SGLang's forward batch.
        exits: Whether the exit from the token-sharded region is part of it; False for a graph of the layers alone.
        num_tokens: Rows that entered the region, those that pad them to a graph's size included.
        entered: Whether the embedding has kept this rank's rows already.
        exit: How rows leave the region; None if all do. Both are set at the entry.
    """

    mode: Mode
    topology: Topology
    batch: Any
    exits: bool = True
    num_tokens: int = 0
    entered: bool = False
    exit: Exit | None = None

    @property
    def sharded(self) -> bool:
        """Whether each rank carries 1/S of the tokens."""
        return self.mode is Mode.SP


_current: ContextVar[Step | None] = ContextVar("the step that runs", default=None)


def current() -> Step | None:
    """The step that runs; None outside of one, as in SGLang's warm-up and in its own graph captures: these are TP."""
    return _current.get()


@contextmanager
def running(step: Step) -> Iterator[Step]:
    """Inside, ``step`` is the current one.

    Raises:
        RuntimeError: another step runs: what it set up would be lost.
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
