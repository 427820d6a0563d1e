"""Real servers: a policy of the user's that does what it should not, and ranks that choose differently."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import requests
from diverging_server import TRIGGER
from harness import SUPPORT, surviving_processes
from prompts import assert_same_answers

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = ("--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel")
POLICY = """
import os, random
from sglang.srt.runtime_context import get_parallel
from sglang_shift.modes import Mode, ShiftPolicy

class Unruly(ShiftPolicy):
    def choose(self, step):
        if step.num_prefill_tokens == 77:
            raise ValueError("seventy-seven")
        if get_parallel().tp_rank == 1 and step.num_prefill_tokens == 55:
            raise OSError("on rank 1 only")
        return random.choice(list(Mode))  # each rank has its own dice

    def explain(self, step, mode):
        raise KeyError("no reason")

    def describe(self):
        return "by dice"
"""


def test_ranks_run_alike_whatever_a_policy_does(servers, reference, tmp_path):
    """It rolls dice on each rank, and fails on rank 1 only; then it fails everywhere, and tokens takes over."""
    Path(tmp_path, "unruly.py").write_text(POLICY)
    server = servers.get(*FLAGS, "--shift-policy", "unruly:Unruly", env={"PYTHONPATH": path_with(tmp_path)})
    assert_same_answers(server.generate_all(reference.prompts, 16), reference.answers[16])
    assert server.generate(list(range(100, 155)), 4).tokens
    steps = server.state["steps"]
    assert server.state["policy"] == "by dice" and min(steps.values()) > 0
    assert "the policy does not say (KeyError: 'no reason')" in server.tail(1_000_000)
    assert server.generate(list(range(200, 277)), 4).meta["shift_steps"] == {"tp": 4, "sp": 0}
    assert server.state["policy"] == "SP for steps of more than 256 tokens, else TP"
    assert (
        server.tail(1_000_000).count("Unruly failed on rank 0 of this replica; from now on: SP for steps of more") == 2
    )
    assert_same_answers(server.generate_all(reference.prompts[::4], 16), reference.answers[16][::4])
    servers.stop()


def path_with(folder: Path) -> str:
    import os

    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_ranks_in_different_modes_end_the_server_with_a_sentence(servers):
    """SGLang's own consensus checker, which the harness turns on and users do not, is off."""
    server = servers.get(
        *FLAGS, "--shift-calibration", "off", module=[str(SUPPORT / "diverging_server.py")],
        env={"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "0"},
    )  # fmt: skip
    assert server.generate(list(range(50)), 4).tokens
    # Ranks in different collectives wait, fail, or go on with wrong numbers: what becomes of the step is not known.
    with contextlib.suppress(requests.RequestException, AssertionError):
        server.generate(list(range(500, 500 + TRIGGER)), 4)  # none of it is cached
    assert server.process.wait(120) != 0
    assert not surviving_processes(server.process.pid)
    log = server.tail(1_000_000)
    assert "ranks do not run the same steps" in log
    assert f"{TRIGGER} tokens, {TRIGGER} of them of prompts, in TP on rank 0" in log
    assert f"{TRIGGER} tokens, {TRIGGER} of them of prompts, in SP on rank 1" in log
    servers.stop()
