"""Plants a failure in a change of the level, on one rank. Only a test can do so: the package has no such switch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

RANK = 1
"""The rank that fails."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(3600)


def memory() -> None:
    import torch

    raise torch.OutOfMemoryError("planted: there is no memory")


FAULTS: dict[str, Callable[[], None]] = {fault.__name__: fault for fault in (kill, hang, memory)}


def places(phase: str) -> list[tuple[Any, str]]:
    """The functions of the package that run in a phase."""
    from sglang_shift.kv.exchange import KvExchange
    from sglang_shift.runtime import level_change
    from sglang_shift.runtime.level_change import LevelChange

    return {
        "check": [(LevelChange, "_check_requests")],
        "quiesce": [(level_change, "retract")],
        "gather": [(LevelChange, "_part")],
        "plan": [(LevelChange, "_unite"), (LevelChange, "_plan")],
        "exchange": [(KvExchange, "_exchange")],
        "rebuild": [(LevelChange, "_rebuild")],
    }[phase]


FIRST_CALLS = {"exchange": 1}
"""How often a function runs before it fails. The exchange has moved a part of the cache then."""


def plant(scheduler: Any, phase: str, fault: str) -> None:
    """Let the next change of :data:`RANK` fail once in a phase."""
    if scheduler.shift_switch.place.rank == RANK:
        for owner, name in places(phase):
            setattr(owner, name, failing(owner, name, FIRST_CALLS.get(phase, 0), FAULTS[fault]))


def failing(owner: Any, name: str, first_calls: int, fault: Callable[[], None]) -> Callable[..., Any]:
    """A function that fails once, after some calls. Then the original is in its place again."""
    original, calls = getattr(owner, name), 0

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > first_calls:
            setattr(owner, name, original)
            fault()
        return original(*args, **kwargs)

    return run


def watch(scheduler: Any) -> None:
    """Let SGLang's watchdog end this rank if a step takes 2 s. In a server, the watchdog ends the whole server.

    It first dumps the stack, and gives its parent five seconds to log. Nobody reads that here.
    """
    from sglang.srt.managers.scheduler_components.invariant_checker import create_scheduler_watchdog
    from sglang.srt.utils import watchdog

    watchdog.pyspy_dump_schedulers = lambda: None
    watchdog.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: time.sleep(min(seconds, 1)))

    class Parent:
        def send_signal(self, _: int) -> None:
            os._exit(1)

    create_scheduler_watchdog(scheduler, watchdog_timeout=2).parent_process = Parent()  # type: ignore[assignment]
