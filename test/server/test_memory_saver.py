"""Memory that is released and resumed: base weights are part of it, and nothing is served from what was lost."""

from __future__ import annotations

import pytest
from harness import SUPPORT
from prompts import assert_same_answers
from sglang_shift.tools.gpu_check import memory
from sglang_shift.tools.gpu_check.answers import Answer
from sglang_shift.tools.gpu_check.memory import check_release
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server
from two_layers import two_layer_model

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = ("--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-policy", "tokens")
MODES = ("tp", "sp")


@pytest.fixture(scope="module", params=["without a backup", "with a backup"])
def server(request, reference, servers):
    flags = [*FLAGS, "--enable-memory-saver"]
    flags += ["--enable-weights-cpu-backup"] if request.param == "with a backup" else []
    return servers.get(*flags, module=[str(SUPPORT / "memory_saver_server.py")])


def answers(server, reference):
    found = []
    for mode in MODES:
        with server.policy(mode):
            found += server.generate_all(reference.prompts[::3], 4)
    return found


def expected(reference):
    return len(MODES) * reference.answers[16][::3]


def test_all_weights_lie_in_memory_that_is_released(server):
    found = server.state["saver"]
    assert found["total"] > 0 and found["outside"] == 0
    for step in ("loading", "assembly"):
        assert 0 < found[f"peak_of_{step}"] <= found["shard_of_a_layer"], step


def test_released_and_resumed(server, reference):
    assert_same_answers(answers(server, reference), expected(reference))
    server.post("/release_memory_occupation", {})
    server.post("/resume_memory_occupation", {})
    if "--enable-weights-cpu-backup" not in server.flags:
        lost = server.generate(reference.prompts[20], 1, return_logprob=False)
        assert lost.tokens != reference.answers[1][20].tokens[:1], "the weights were not released"
        body = {"model_path": two_layer_model(), "load_format": "auto", "abort_all_requests": False}
        assert server.post("/update_weights_from_disk", body)["success"]
    assert_same_answers(answers(server, reference), expected(reference))


@pytest.mark.parametrize("server", ["with a backup"], indirect=True)
def test_the_gpu_check_tells_what_came_back(server, tmp_path):
    """On the same server; what is free is made up."""
    checked, record = Server([], server.url, None), Record(folder=tmp_path)
    free = iter([100, 150, 100])
    check_release(record, checked, lambda: next(free), least=50)
    assert record.problems == []
    assert (record.rows[0]["freed_bytes"], record.rows[0]["taken_bytes"]) == (50, 50)
    free = iter([100, 120, 100])
    check_release(record, checked, lambda: next(free), least=50)
    assert record.problems == ["20 bytes were freed and 20 taken again, less than the weights' 50"]


class TestWithoutServer:
    """The GPU check of the memory saver, on a server that is made up."""

    @pytest.fixture(autouse=True)
    def _made_up(self, monkeypatch):
        def answer(token):
            return Answer([token], [-0.1], [{token: -0.1}], [])

        told = iter([[answer(1)], [answer(2)], [answer(1)], [answer(3)]])  # TP and SP before, TP and SP after
        self.free, self.pool, self.weights, self.done = 0, 100, 50, []
        monkeypatch.setattr(memory, "ask", lambda server, asked: next(told))
        monkeypatch.setattr(memory, "call", self.call)
        monkeypatch.setattr(memory, "set_threshold", lambda server, threshold: None)
        monkeypatch.setattr(Server, "flush", lambda server: self.done.append("flush"))

    def call(self, url, body, **how):
        """Free and take memory as SGLang does: without tags, all of it."""
        action = url.rpartition("/")[2]
        self.done.append(action)
        tags = body.get("tags") or ["weights", "kv_cache"]
        size = self.weights * ("weights" in tags) + self.pool * ("kv_cache" in tags)
        self.free += size if action == "release_memory_occupation" else -size

    def found(self, tmp_path, least):
        record = Record(folder=tmp_path)
        check_release(record, Server([], "http://nowhere", None), lambda: self.free, least)
        return record

    def test_other_answers(self, tmp_path):
        record = self.found(tmp_path, least=50)
        assert record.problems == ["sp, after resuming: answer 0, token 0: 3 instead of 2"]
        assert self.done == ["flush", "release_memory_occupation", "resume_memory_occupation"], "a busy one keeps all"

    def test_weights_that_stay(self, tmp_path):
        self.weights = 0
        problem, _ = self.found(tmp_path, least=50).problems
        assert problem == "0 bytes were freed and 0 taken again, less than the weights' 50"
