"""Notices at once that a process of the server has died. SGLang's watchdog looks once a second."""

from __future__ import annotations

import multiprocessing
from multiprocessing import connection

from sglang.srt.utils.common import kill_itself_when_parent_died
from sglang.srt.utils.watchdog import SubprocessWatchdog

from sglang_shift.seams import overrides, relies_on, substitutes_for


@substitutes_for(
    "sglang.srt.utils.watchdog:SubprocessWatchdog",
    "With instances, requests may end on other ranks until the server notices that a process has died.",
)
class ProcessWatch(SubprocessWatchdog):
    """SGLang's watchdog, which the end of a process wakes up."""

    @overrides("Our method also waits for the end of a process, and not only for the next look at it.")
    @relies_on(
        "sglang.srt.utils.watchdog:SubprocessWatchdog._check_processes",
        "This method ends the server if a process has died. A process that ended by itself is no reason.",
    )
    def _monitor_loop(self) -> None:
        while not self._stop_event.is_set():
            # These come before the look, so that a process which ends after the look wakes this thread.
            running = [each.sentinel for each in self._processes if each.is_alive()]
            if self._check_processes():
                return
            connection.wait(running, self._interval)


@relies_on(
    "sglang.srt.utils.common:kill_itself_when_parent_died",
    "This function asks the system to end this process with its parent. It is too late if the parent has ended.",
)
def end_with_parent() -> None:
    """End this process when the process that started it ends, also if that has happened already.

    To import SGLang takes many seconds. A launcher that is killed meanwhile would leave this process behind.
    """
    kill_itself_when_parent_died()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("sglang_shift: the process that started this one has ended")
