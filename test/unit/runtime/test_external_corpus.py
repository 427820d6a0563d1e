"""A corpus that is added to NGRAM at run time: all ranks draft from it from the same step on."""

from __future__ import annotations

import time

import pytest
from sglang.srt.managers.io_struct import AddExternalCorpusReqInput
from sglang.srt.speculative.external_corpus_manager import ExternalCorpusManager
from sglang_shift.runtime.scheduler import ShiftScheduler


class Worker:
    """A draft worker that takes some time to load a corpus."""

    def __init__(self, seconds: float, error: Exception | None) -> None:
        self.seconds, self.error = seconds, error
        self.loaded: list[str] = []
        self.committed: dict[str, int] = {}

    def add_external_corpus(self, corpus_id: str, token_chunks: list[list[int]]) -> int:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.loaded.append(corpus_id)
        return sum(map(len, token_chunks))

    def commit_corpus_load(self, corpus_id: str, loaded_token_count: int) -> None:
        self.committed[corpus_id] = loaded_token_count


@pytest.fixture
def rank():
    """Makes the scheduler of a rank whose worker takes so long, and lists its answers."""

    def make(seconds: float, error: Exception | None = None) -> tuple[ShiftScheduler, Worker, list]:
        scheduler, worker, answers = ShiftScheduler.__new__(ShiftScheduler), Worker(seconds, error), []
        scheduler.external_corpus_manager = ExternalCorpusManager(
            worker, lambda answer, request: answers.append(answer)
        )
        return scheduler, worker, answers

    return make


def add(scheduler, name):
    return scheduler.add_external_corpus(AddExternalCorpusReqInput(corpus_id=name, token_chunks=[[1, 2], [3]]))


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_fast_and_slow_ranks_have_the_corpus_before_the_next_step(rank, seconds):
    scheduler, worker, answers = rank(seconds)
    for number, name in enumerate(("a", "b"), 1):  # two requests may come before one step
        assert add(scheduler, name) is None
        assert len(worker.loaded) == len(worker.committed) == len(answers) == number
        assert answers[-1].success and answers[-1].corpus_id == name and answers[-1].loaded_token_count == 3
    scheduler.external_corpus_manager.check_pending_load()
    assert len(answers) == 2, "each request is answered once"


def test_a_corpus_that_cannot_be_loaded(rank):
    scheduler, worker, answers = rank(0.5, ValueError("it is too large"))
    assert add(scheduler, "a") is None
    assert [(answer.success, answer.message) for answer in answers] == [(False, "it is too large")]
    assert not worker.committed


def test_a_server_without_ngram_answers_at_once(rank):
    scheduler, _, _ = rank(0.0)
    scheduler.external_corpus_manager = None
    assert not add(scheduler, "a").success
