"""Data parallelism with whole groups: two replicas of two ranks, each of which chooses its own modes."""

from __future__ import annotations

import pytest
import requests
from harness import SMALL_CHUNKS
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]


def test_both_replicas_run_both_modes(servers, reference):
    server = servers.get(*SMALL_CHUNKS, "--dp-size", "2", "--load-balance-method", "round_robin")
    answers = server.generate_all(reference.prompts, 8)
    assert_same_answers(answers, reference.answers[16])
    states = requests.get(server.url + "/server_info", timeout=60).json()["internal_states"]
    assert len(states) == 2
    for state in states:
        assert all(count > 0 for count in state["shift"]["steps"].values()), states
