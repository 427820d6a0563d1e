"""All ranks and nodes must have been started alike, and must run the same steps in the same modes."""

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
WATCH_S = 1.0
"""Seconds between comparisons of the steps that the ranks ran."""
KEPT_STEPS = 4096
"""Steps that a rank remembers: many more than it can be ahead of what rank 0 last said."""


def statement(config: ShiftConfig) -> dict[str, Any]:
    """What a rank says of itself, flat; must be equal on all."""
    return {
        "sglang": version("sglang"),
        "sglang_shift": __version__,
        "torch": torch.__version__,
        "--tp-size": config.world_size,
        **{flag.option: getattr(config, flag.setting) for flag in FLAGS},
        "--dtype": str(get_model().dtype),
    }


def check(config: ShiftConfig) -> None:
    """Compare this rank's statement with every other's.

    Through the rendezvous store rather than a collective, so that a rank which runs stock SGLang,
    and says nothing, is reported instead of waited for without end.

    Raises:
        ShiftError: a rank differs or is silent; names both ranks and both values.
    """
    group = get_parallel().tp_group
    store = dist.PrefixStore("sglang_shift/agreement", dist.distributed_c10d._get_default_store())
    mine = statement(config)
    store.set(str(group.rank_in_group), json.dumps(mine))
    for other in range(group.world_size):
        try:
            store.wait([str(other)], WAIT)
        except (dist.DistStoreError, RuntimeError):
            raise _logged(
                f"rank {other} was started without sglang_shift: rank {group.rank_in_group} has "
                f"--sp-size {config.sp_size} and waited {WAIT.seconds} s for it; start every node with the same command"
            ) from None
        if problem := difference(group.rank_in_group, mine, other, json.loads(store.get(str(other)))):
            raise _logged(problem)


def difference(rank: int, mine: dict[str, Any], other: int, theirs: dict[str, Any]) -> str | None:
    """One sentence that names both ranks and both values, or None where they agree."""
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if not differing:
        return None
    pairs = ", ".join(f"{k} is {mine.get(k)} on rank {rank} and {theirs.get(k)} on rank {other}" for k in differing)
    return f"ranks were started differently: {pairs}; start every node with the same command and versions"


def from_rank_0(numbers: Sequence[float]) -> list[float]:
    """Rank 0's ``numbers``, on every rank of the replica. A collective of its CPU group, so in step with all others."""
    group = get_parallel().tp_group
    shared = torch.tensor(numbers, dtype=torch.float64)
    dist.broadcast(shared, src=group.ranks[0], group=group.cpu_group)
    return shared.tolist()


class StepWatch:
    """Notices that ranks do not run the same steps in the same modes, and ends this one rather than wait for ever.

    Ranks in different modes are in different collectives: none of them comes out, or what comes out is wrong. So
    this cannot be noticed by the thread that runs the steps. A thread beside it tells, about once a second, through
    the rendezvous store, how far rank 0 is and a digest of all its steps; on each other rank it compares.

    Args:
        rank: This rank in its replica.
        store: The rendezvous store, or what is like it.
        end: Ends the server. Without an orderly end of this process: the other thread may be waiting.
        period: Seconds between comparisons.
    """

    def __init__(self, rank: int, store: Any, end: Callable[[], None] | None = None, period: float = WATCH_S) -> None:
        self._rank, self._store, self._end, self._period = rank, store, end or _end_server, period
        self._count = self._digest = 0
        self._last = (0, 0, (0, 0, MODES[0]))
        self._kept = [self._last] * KEPT_STEPS
        self._said = self._heard = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang_shift_watch", daemon=True)

    @classmethod
    def of_replica(cls) -> StepWatch:
        """That of this rank, started."""
        group = get_parallel().tp_group
        store = dist.PrefixStore("sglang_shift/steps", dist.distributed_c10d._get_default_store())
        watch = cls(group.rank_in_group, store)
        watch.start()
        return watch

    def start(self) -> None:
        """Begin to compare."""
        self._thread.start()

    def stop(self) -> None:
        """Compare no more."""
        self._stopped.set()
        self._thread.join(2 * self._period)

    def note(self, tokens: int, prefill_tokens: int, mode: Mode) -> None:
        """A step is about to run. These are what its collectives depend on."""
        step = (tokens * 1_000_003 + prefill_tokens) * len(MODES) + MODES.index(mode)
        self._count = count = self._count + 1
        self._digest = digest = (self._digest * 1_000_003 + step + 1) % ((1 << 61) - 1)
        # One assignment, so that the other thread sees all of it or nothing.
        self._kept[count % KEPT_STEPS] = self._last = (count, digest, (tokens, prefill_tokens, mode))

    def compare(self) -> str | None:
        """Tell, or compare, once; what differs, in one sentence, or None."""
        count, digest, step = self._last
        if self._rank == 0:
            if count != self._said:
                self._said = count
                self._store.set("0", json.dumps([count, digest, _in_words(step)]))
            return None
        if not self._store.check(["0"]):
            return None
        theirs, their_digest, their_step = json.loads(self._store.get("0"))
        mine, my_digest, my_step = self._kept[theirs % KEPT_STEPS]
        if theirs == self._heard or mine != theirs:  # compared already, or this rank is not there yet
            return None
        self._heard = theirs
        if my_digest == their_digest:
            return None
        return (
            f"ranks do not run the same steps: the steps up to number {theirs} differ, that one is "
            f"{their_step} on rank 0 and {_in_words(my_step)} on rank {self._rank}; this rank ends, as the others "
            "would wait for it without end (a policy must follow from what is the same on every rank)"
        )

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                problem = self.compare()
            except Exception:  # the store is gone: so is rank 0's node, and with it this server
                return
            if problem:
                logger.critical("sglang_shift: %s", problem)
                self._end()
                return


def _end_server() -> None:
    """Tell the parent, as SGLang's ranks do when they fail: the controller of replicas does not see them end."""
    os.kill(os.getppid(), signal.SIGQUIT)
    os._exit(1)


def _in_words(step: tuple[int, int, Mode]) -> str:
    tokens, prefill_tokens, mode = step
    return f"{tokens} tokens, {prefill_tokens} of them of prompts, in {mode.name}"


def _logged(message: str) -> ShiftError:
    logger.error("sglang_shift: %s", message)
    return ShiftError(message)
