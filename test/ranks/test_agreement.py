"""The standing check that all ranks run the same steps in the same modes."""

from __future__ import annotations

import os
import random

import pytest
from harness import run_ranks
from sglang_shift.modes import Mode
from sglang_shift.runtime.agreement import STEP_HISTORY, StepWatch


class Store:
    """What the watch uses of PyTorch's store."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key].encode()

    def check(self, keys):
        return all(key in self.values for key in keys)


@pytest.fixture
def pair():
    store = Store()
    return StepWatch(0, store), StepWatch(1, store)


def steps(count: int, seed: int = 0) -> list[tuple[int, int, Mode]]:
    rng = random.Random(seed)
    return [(n, rng.choice([0, n]), rng.choice(list(Mode))) for n in (rng.randint(1, 9) for _ in range(count))]


def run(watch: StepWatch, made) -> None:
    for step in made:
        watch.record(*step)


def test_the_same_steps_are_no_problem_wherever_the_ranks_are(pair):
    first, other = pair
    assert other.compare() is None, "rank 0 has not said anything yet"
    made = steps(2000)
    for behind in (0, 7, 60):
        at = first._count
        run(first, made[at : at + 500])
        run(other, made[other._count : first._count - behind])
        assert first.compare() is None is other.compare()
        run(other, made[other._count : first._count + 90])
        run(first, made[first._count : other._count])
        assert other.compare() is None


@pytest.mark.parametrize("other_step", [(8, 0, Mode.SP), (9, 0, Mode.TP), (8, 8, Mode.TP)])
def test_another_step_or_mode_is_noticed(pair, other_step):
    first, other = pair
    made = steps(100)
    run(first, [*made, (8, 0, Mode.TP)])
    run(other, [*made, other_step])
    first.compare()
    problem = other.compare()
    assert "up to number 101 differ, that one is 8 tokens, 0 of them of prompts, in TP on rank 0" in problem
    tokens, prefill, mode = other_step
    assert f"{tokens} tokens, {prefill} of them of prompts, in {mode.value.upper()} on rank 1" in problem


def test_a_difference_long_ago_is_still_one(pair):
    first, other = pair
    made = steps(3 * STEP_HISTORY)
    run(first, made)
    run(other, [(1, 0, Mode.SP if made[0][2] is Mode.TP else Mode.TP), *made[1:]])
    first.compare()
    assert "differ" in other.compare()


def test_a_rank_that_is_not_there_yet_compares_later(pair):
    first, other = pair
    run(first, [(1, 0, Mode.TP)] * 3)
    run(other, [(1, 0, Mode.TP)] * 2)
    first.compare()
    assert other.compare() is None
    other.record(1, 0, Mode.SP)
    assert "differ" in other.compare()


def hang_in_different_modes(rank, size, noticed):
    import torch
    import torch.distributed as dist

    mode = Mode.SP if rank == size - 1 else Mode.TP
    watch = StepWatch(rank, dist.PrefixStore("w", dist.distributed_c10d._get_default_store()), noticed.set, 0.05)
    watch.start()
    for _ in range(20):
        watch.record(4, 0, Mode.TP)
        dist.all_reduce(torch.ones(8))
    watch.record(4, 0, mode)
    ones, other = torch.ones(8), torch.empty(8)
    work = (
        dist.all_reduce(ones, async_op=True) if mode is Mode.TP else dist.all_to_all_single(other, ones, async_op=True)
    )
    assert noticed.wait(60), "the collective cannot say so"
    assert not work.is_completed(), "then there would be nothing to notice"
    os._exit(0)  # as the watch itself does: nothing that waits for the collective can end in order


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_wait_in_different_collectives_are_told(size):
    import torch.multiprocessing as mp

    noticed = mp.get_context("fork").Event()
    run_ranks(size, hang_in_different_modes, noticed)
    assert noticed.is_set()


def test_a_store_that_is_gone_ends_the_watch_only():
    class Gone:
        def check(self, keys):
            raise ConnectionError("rank 0 has ended")

    ended = []
    watch = StepWatch(1, Gone(), lambda: ended.append(1), period=0.01)
    watch.start()
    watch._thread.join(10)
    assert not watch._thread.is_alive() and not ended


def child_that_ends():
    StepWatch(1, None)._end()


def test_the_end_of_a_rank_is_told_to_its_parent():
    """The controller of data-parallel replicas, say, which looks after none of its ranks."""
    import multiprocessing
    import signal

    told = []
    before = signal.signal(signal.SIGQUIT, lambda *_: told.append(1))
    try:
        child = multiprocessing.get_context("fork").Process(target=child_that_ends)
        child.start()
        child.join(60)
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert child.exitcode == 1
    assert told
