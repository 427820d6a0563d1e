"""A whole server that replays (recorded) graphs in both modes: its answers, and what it says of its graphs."""

from __future__ import annotations

import pytest
from harness import SUPPORT
from prompts import assert_same_answers
from sglang_shift.cost.model import PHASES
from sglang_shift.tools.gpu_check.comparison import ServerComparison, ServerSetup
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server

pytestmark = [pytest.mark.server, pytest.mark.full]

DECODE, PREFILL = [1, 2, 4, 8, 12], [4, 16, 64, 250, 1000, 2048]


@pytest.fixture(scope="module")
def server(reference, servers):
    return servers.get(
        "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-policy", "queue-depth",
        "--cuda-graph-bs-decode", *map(str, DECODE), "--cuda-graph-bs-prefill", *map(str, PREFILL),
        "--cuda-graph-backend-prefill", "breakable", "--attention-backend", "recorded",
        module=[str(SUPPORT / "recorded_server.py")],
    )  # fmt: skip


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("mode", ["tp", "sp"])
def test_same_tokens_and_logprobs(server, reference, mode, concurrency):
    before = server.state["graphs"]
    with server.policy(mode) as steps:
        answers = server.generate_all(reference.prompts[::2], concurrency)
    assert_same_answers(answers, reference.answers[concurrency][::2])
    after = server.state["graphs"]
    assert after["decode"]["sp"]["sizes"] == [2, 4, 8, 12] and after["decode"]["tp"]["sizes"] == DECODE
    assert after["prefill"]["sp"]["sizes"] == after["prefill"]["tp"]["sizes"] == PREFILL
    grown = {
        (phase, what): after[phase][mode][what] - before[phase][mode][what]
        for phase in ("decode", "prefill")
        for what in ("replayed", "missed")
    }
    assert sum(grown.values()) == steps[mode], "each step is counted"
    assert grown["prefill", "replayed"] > 0
    if concurrency == 1:
        assert grown["decode", "replayed"] > 0 and grown["decode", "missed"] == 0
    else:
        assert grown["decode", "missed"] > 0, "more requests than the largest graph has"


def test_the_gpu_check_sees_that_they_are_replayed(server, tmp_path):
    record = Record(folder=tmp_path)
    compared = ServerComparison(record, "recorded", [], vocabulary=4096, tolerance=1e-4)
    itself = Server([], server.url, None)
    contender = ServerSetup("itself", [], graphs=PHASES)
    compared.take_reference(contender, itself)
    compared.compare(contender, itself)
    assert record.problems == []
    replayed = [row["graphs"]["decode"]["sp"]["replayed"] for row in record.rows if "mode" in row]
    assert replayed[0] < replayed[1] == replayed[2], "in sp only"
