"""Check that all ranks have the same settings, and that they run the same steps in the same modes."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.runtime_context import get_model, get_parallel

from sglang_shift import __version__
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import ShiftError
from sglang_shift.flags import FLAGS
from sglang_shift.modes import MODES, Mode

logger = logging.getLogger(__name__)

WAIT = datetime.timedelta(seconds=120)
"""How long a rank waits for the statement of another rank."""
WATCH_S = 1.0
"""Seconds between comparisons of the steps that the ranks ran."""
STEP_HISTORY = 4096
"""Steps that a rank remembers. A rank is never that many steps ahead of rank 0's last message."""


def statement(config: ShiftConfig) -> dict[str, Any]:
    """The versions and settings of this rank, without nesting. They must be equal on all ranks."""
    return {
        "sglang": version("sglang"),
        "sglang_shift": __version__,
        "torch": torch.__version__,
        "--tp-size": config.world_size,
        **{flag.option: getattr(config, flag.setting) for flag in FLAGS},
        "--dtype": str(get_model().dtype),
    }


def check(config: ShiftConfig) -> None:
    """Compare this rank's statement with the statement of every other rank.

    The statements go through the rendezvous store. A rank that runs stock SGLang sends no statement, and this rank
    reports it. With a collective, this rank would wait for it without end.

    Raises:
        ShiftError: a rank differs, or sends no statement. The error names both ranks, and both values that differ.
    """
    group = get_parallel().tp_group
    store = dist.PrefixStore("sglang_shift/agreement", dist.distributed_c10d._get_default_store())
    own = statement(config)
    store.set(str(group.rank_in_group), json.dumps(own))
    for other in range(group.world_size):
        try:
            store.wait([str(other)], WAIT)
        except (dist.DistStoreError, RuntimeError):
            raise _log_error(
                f"rank {other} was started without sglang_shift: rank {group.rank_in_group} has "
                f"--sp-size {config.sp_size} and waited {WAIT.seconds} s for it; start every node with the same command"
            ) from None
        if problem := difference(group.rank_in_group, own, other, json.loads(store.get(str(other)))):
            raise _log_error(problem)


def difference(rank: int, own: dict[str, Any], other: int, other_statement: dict[str, Any]) -> str | None:
    """One sentence that names both ranks and both values, or None if the statements agree."""
    differing = [key for key in {**own, **other_statement} if own.get(key) != other_statement.get(key)]
    if not differing:
        return None
    pairs = ", ".join(
        f"{k} is {own.get(k)} on rank {rank} and {other_statement.get(k)} on rank {other}" for k in differing
    )
    return f"ranks were started differently: {pairs}; start every node with the same command and versions"


def from_rank_0(numbers: Sequence[float]) -> list[float]:
    """Send rank 0's ``numbers`` to every rank of the replica.

    This is a collective of the replica's CPU group, so all ranks must call it at the same point.
    """
    group = get_parallel().tp_group
    shared = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(shared, src=group.ranks[0], group=group.cpu_group)
    return shared.tolist()


def from_all_ranks(numbers: Sequence[float]) -> list[list[float]]:
    """Get the ``numbers`` of every rank of the replica, in the order of the ranks. They have the same length.

    This is a collective of the replica's CPU group, so all ranks must call it at the same point.
    """
    group = get_parallel().tp_group
    own = torch.tensor(numbers, dtype=torch.float64)
    shared = [torch.empty_like(own) for _ in range(group.world_size)]
    dist.all_gather(shared, own, group=group.cpu_group)
    return [each.tolist() for each in shared]


class StepWatch:
    """Checks that all ranks run the same steps in the same modes. If they do not, it ends the server.

    Ranks in different modes call different collectives. These collectives never return, or return wrong values, so
    the thread that runs the steps cannot notice the difference. A second thread compares about once a second. On
    rank 0 it writes the number of steps and a digest of them to the rendezvous store. On every other rank it
    compares these with its own.

    Args:
        rank: This rank in its replica.
        store: The rendezvous store, or an object with its ``set``, ``get`` and ``check``.
        end: Ends the server. It cannot end this process in the normal way, because the other thread may wait for ever.
        period: Seconds between comparisons.
    """

    def __init__(self, rank: int, store: Any, end: Callable[[], None] | None = None, period: float = WATCH_S) -> None:
        self._rank, self._store, self._end, self._period = rank, store, end or _end_server, period
        self._count = self._digest = 0
        self._last = (0, 0, (0, 0, MODES[0]))
        self._history = [self._last] * STEP_HISTORY
        self._last_sent = self._last_compared = 0
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang_shift_watch", daemon=True)

    @classmethod
    def of_replica(cls) -> StepWatch:
        """Make the watch of this rank, and start it."""
        group = get_parallel().tp_group
        store = dist.PrefixStore("sglang_shift/steps", dist.distributed_c10d._get_default_store())
        watch = cls(group.rank_in_group, store)
        watch.start()
        return watch

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop_event.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._period)

    def record(self, tokens: int, prefill_tokens: int, mode: Mode) -> None:
        """Record a step that is about to run. Its collectives depend on these arguments."""
        step = (tokens * 1_000_003 + prefill_tokens) * len(MODES) + MODES.index(mode)
        self._count = count = self._count + 1
        self._digest = digest = (self._digest * 1_000_003 + step + 1) % ((1 << 61) - 1)
        # This is one assignment, so the other thread sees the whole tuple or the one before.
        self._history[count % STEP_HISTORY] = self._last = (count, digest, (tokens, prefill_tokens, mode))

    def compare(self) -> str | None:
        """On rank 0, write to the store. On other ranks, compare, and return one sentence if the steps differ."""
        count, digest, step = self._last
        if self._rank == 0:
            if count != self._last_sent:
                self._last_sent = count
                self._store.set("0", json.dumps([count, digest, _describe(step)]))
            return None
        if not self._store.check(["0"]):
            return None
        rank_0_count, rank_0_digest, rank_0_step = json.loads(self._store.get("0"))
        own_count, own_digest, own_step = self._history[rank_0_count % STEP_HISTORY]
        if rank_0_count == self._last_compared or own_count != rank_0_count:
            return None  # this rank has compared that step, or has not run it yet
        self._last_compared = rank_0_count
        if own_digest == rank_0_digest:
            return None
        return (
            f"ranks do not run the same steps: the steps up to number {rank_0_count} differ, that one is "
            f"{rank_0_step} on rank 0 and {_describe(own_step)} on rank {self._rank}; this rank ends, as the others "
            "would wait for it without end (a policy must follow from what is the same on every rank)"
        )

    def _run(self) -> None:
        while not self._stop_event.wait(self._period):
            try:
                problem = self.compare()
            except Exception:  # the store is gone, so rank 0's node has ended, and this server ends with it
                return
            if problem:
                logger.critical("sglang_shift: %s", problem)
                self._end()
                return


def _end_server() -> None:
    """Signal the parent, as SGLang's ranks do when they fail. The controller of replicas does not see them end."""
    os.kill(os.getppid(), signal.SIGQUIT)
    os._exit(1)


def _describe(step: tuple[int, int, Mode]) -> str:
    tokens, prefill_tokens, mode = step
    return f"{tokens} tokens, {prefill_tokens} of them of prompts, in {mode.name}"


def _log_error(message: str) -> ShiftError:
    logger.error("sglang_shift: %s", message)
    return ShiftError(message)
