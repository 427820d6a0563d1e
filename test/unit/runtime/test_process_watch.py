"""The death of a process is noticed at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

from sglang_shift.runtime.process_watch import ProcessWatch, end_with_parent

FORK = multiprocessing.get_context("fork")
HOUR = 3600.0


def test_a_killed_process_ends_the_server_before_the_next_look(monkeypatch):
    ended, kill = threading.Event(), os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.set() if pid == os.getpid() else kill(pid, number))
    processes = [FORK.Process(target=time.sleep, args=(HOUR,), daemon=True) for _ in range(2)]
    done = FORK.Process(target=os.getpid)
    for process in (*processes, done):
        process.start()
    done.join()
    watch = ProcessWatch([done, *processes], interval=HOUR)
    watch.start()
    assert not ended.wait(0.2), "a process that ended by itself is no reason"
    processes[1].kill()
    assert ended.wait(60)
    processes[0].kill()


class EndsBetweenLooks:
    """A process that has closed its files, but counts as alive at the first two looks."""

    pid, exitcode = 1, -9

    def __init__(self) -> None:
        self.sentinel, other_end = os.pipe()
        os.close(other_end)
        self.looks = 0

    def is_alive(self) -> bool:
        self.looks += 1
        return self.looks < 3


def test_a_process_that_ends_between_two_looks_is_noticed(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.set())
    ProcessWatch([EndsBetweenLooks()], interval=HOUR).start()
    assert ended.wait(60)


def left_behind(begins, ends) -> None:
    """Start a process that waits until its parent, this process, has ended."""

    def wait() -> None:
        begins.wait()
        end_with_parent()
        ends.set()

    child = FORK.Process(target=wait)
    child.start()
    os._exit(0)


def test_a_process_whose_parent_has_ended_before_it_began_ends():
    begins, ends = FORK.Event(), FORK.Event()
    parent = FORK.Process(target=left_behind, args=(begins, ends))
    parent.start()
    parent.join()
    begins.set()
    assert not ends.wait(1), "it goes on without a parent"


def test_a_process_goes_on_with_its_parent():
    ends = FORK.Event()
    child = FORK.Process(target=lambda: (end_with_parent(), ends.set()))
    child.start()
    child.join()
    assert ends.is_set() and child.exitcode == 0
