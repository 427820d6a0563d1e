"""The script that times the choice of a mode: it runs."""

from __future__ import annotations

import importlib

from harness import REPO
from sglang_shift.policy.builtin import TokenThreshold


class Watched(TokenThreshold):
    """Keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__(256)
        object.__setattr__(self, "asked", [])

    def choose(self, step):
        self.asked.append(step)
        return super().choose(step)


def test_the_whole_choice_on_a_scheduler_with_only_what_it_reads(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmark")
    policy = Watched()
    assert importlib.import_module("selection").whole_choice(policy, repeats=3) > 0
    found = [(step.num_tokens, step.num_running, step.num_waiting, step.kv_reads) for step in policy.asked]
    assert found == [(64, 64, 1000, 64 * 900)] * 3
