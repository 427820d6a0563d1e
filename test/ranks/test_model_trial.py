"""Trials end with a reason, and leave no process behind."""

from __future__ import annotations

import os
import signal
import time

import model_trial
import pytest
from model_trial import CONTEXT, Task, TrialError, started, trial

TASK = Task(flags=(), patterns=("tp",), stock=True, port=0)


def rank_that_fails(rank, task, pipe, log):
    """Rank 1 fails. Rank 0 waits for it without end."""
    if rank == 1:
        pipe.send("Traceback: rank 1 has no weights")
        os._exit(0)
    time.sleep(1000)


def rank_that_dies(rank, task, pipe, log):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def rank_that_hangs(rank, task, pipe, log):
    model_trial.prepare_process(log)
    time.sleep(1000)


@pytest.mark.parametrize(
    ("main", "seconds", "text"),
    [
        (rank_that_fails, 60, "rank 1 failed:\nTraceback: rank 1 has no weights"),
        (rank_that_dies, 60, "rank 1 failed:\nthe process ended with -9"),
        (rank_that_hangs, 3, r"ranks \[0, 1\] did not end in 3 s(.|\n)*in rank_that_hangs"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_the_trial(main, seconds, text, monkeypatch):
    monkeypatch.setattr(model_trial, "rank_main", main)
    with pytest.raises(TrialError, match=text), started(TASK, 2) as ranks:
        processes = ranks.processes
        ranks.results(seconds)
    assert not any(process.is_alive() for process in processes)


def test_the_traceback_of_a_rank_is_the_message():
    with pytest.raises(TrialError, match="Repo id must be"):
        trial("/no/such/model", tp_size=2, seconds=60)
    assert CONTEXT.get_start_method() == "forkserver"
