"""The GPU check's comparison of servers, on the CPU; and its platform that puts two ranks on one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import distributions
from types import SimpleNamespace

import pytest
from sglang_shift.models.demo import demo_model_path
from sglang_shift.modes import Mode, StepState
from sglang_shift.policy.builtin import TokenThreshold
from sglang_shift.tools import servers as processes
from sglang_shift.tools.gpu_check import comparison, engine, one_gpu
from sglang_shift.tools.gpu_check.answers import Answer, make_prompts
from sglang_shift.tools.gpu_check.comparison import (
    EXPECTED,
    REQUESTS,
    THRESHOLDS,
    ServerComparison,
    ServerSetup,
    explain,
)
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server

ONE = ServerSetup("TP=1", ["--tp-size", "1"])
TWO = ServerSetup("two ranks", ["--tp-size", "2"])


@pytest.fixture
def kept(monkeypatch, forked_launches):
    """Servers of two ranks, by their log's name, that do not end with a comparison."""
    started, start = {}, comparison.start
    with ExitStack() as stack:

        def starting(flags, port, log, **how) -> Server:
            server = start(flags, port, log, **how)
            if flags[flags.index("--tp-size") + 1] != "2":
                return server
            stack.callback(server.stop)
            started[log.name] = server
            kept = Server(server.processes, server.url, server.log)
            kept.stop = lambda: None
            return kept

        monkeypatch.setattr(comparison, "start", starting)
        yield started


@pytest.mark.server
@pytest.mark.full
def test_two_ranks_answer_as_one(kept, tmp_path):
    record = Record(folder=tmp_path)
    flags = ["--model-path", demo_model_path(), "--dtype", "float32", "--max-total-tokens", "16384"]
    flags += ["--chunked-prefill-size", "512", "--max-running-requests", str(REQUESTS)]
    compared = ServerComparison(record, "cpu", flags, vocabulary=4096, tolerance=1e-4)
    compared.run(ONE, [TWO])
    assert record.problems == []
    waits, rows = [row for row in record.rows if "mode" not in row], [row for row in record.rows if "mode" in row]
    assert [row["server"] for row in waits] == ["TP=1", "two ranks"] and all(row["waited_seconds"] > 0 for row in waits)
    assert [row["mode"] for row in rows] == ["tp", "sp", "shift"]
    for row in rows:
        assert row["tokens"] == 2 * 12 * 16 and row["ties"] == 0 and row["exchange"] == "collective"
        assert row["graphs"]["decode"]["sp"]["sizes"] == [], "a CPU has none"
    # Answers that are another's are told apart, and that there are no graphs is one more problem.
    compared.reference = compared.reference[::-1]
    compared.tolerance = 0.1
    compared.compare(ServerSetup("two", TWO.flags, graphs=comparison.PHASES), kept["engine-cpu-two-ranks.log"])
    assert record.problems and "two, tp: " in record.problems[0]
    assert "two, sp: there are no graphs of a decode in sp" in record.problems


@pytest.mark.server
@pytest.mark.full
def test_a_server_that_does_not_start(servers, tmp_path):
    servers.stop()
    record = Record(folder=tmp_path)
    compared = ServerComparison(record, "cpu", ["--model-path", demo_model_path()], vocabulary=4096, tolerance=1e-4)
    compared.take_reference = lambda *_: None
    compared.run(ONE, [ServerSetup("three ranks", ["--tp-size", "3"])], at_once=True)
    (problem,) = record.problems
    assert problem.startswith("three ranks: the server ended with exit code 2")
    assert "--tp-size 3 does not divide" in problem
    assert (tmp_path / "engine-cpu-three-ranks.log").exists()


class TestOrder:
    """When servers are started, asked and stopped; none is one."""

    @pytest.fixture
    def compared(self, monkeypatch, tmp_path):
        self.events = []

        def starting(flags, port, log, environment):
            name = log.stem.rsplit("-", 1)[-1]
            self.events.append(f"start {name}")
            return SimpleNamespace(stop=lambda: self.events.append(f"stop {name}"), flags=flags)

        monkeypatch.setattr(comparison, "start", starting)
        compared = ServerComparison(Record(folder=tmp_path), "made-up", ["--all"], vocabulary=10, tolerance=0.1)
        compared.take_reference = lambda setup, server: self.events.append(f"ask {setup.label}")
        compared.compare = lambda setup, server: self.events.append(f"compare {setup.label}")
        return compared

    others = (ServerSetup("a", []), ServerSetup("b", []))

    def test_one_after_the_other(self, compared):
        compared.run(ServerSetup("one", []), self.others)
        assert self.events == [
            *("start one", "ask one", "stop one"),
            *("start a", "compare a", "stop a"),
            *("start b", "compare b", "stop b"),
        ]

    def test_all_at_once(self, compared):
        compared.run(ServerSetup("one", []), self.others, at_once=True)
        assert self.events == [
            *("start one", "start a", "start b"),
            *("ask one", "compare a", "compare b"),
            *("stop b", "stop a", "stop one"),
        ]

    def test_all_end_where_there_is_no_reference(self, compared):
        def fails(*_):
            raise OSError("no answer")

        compared.take_reference = fails
        with pytest.raises(OSError, match="no answer"):
            compared.run(ServerSetup("one", []), self.others, at_once=True)
        assert self.events[3:] == ["stop b", "stop a", "stop one"]

    def test_only_the_others_shift(self, compared):
        flags = {}
        compared.take_reference = compared.compare = lambda setup, server: flags.update({setup.label: server.flags})
        compared.run(ServerSetup("one", ["--x"]), self.others)
        assert flags["one"] == ["--all", "--x"] and flags["a"] == ["--all", *comparison.SHIFT]


def test_servers_have_variables_that_a_check_sets(monkeypatch, tmp_path):
    """FlashInfer's check sets one long after the module that starts servers was imported."""
    given = {}

    def starting(line, env, **_):
        given.update(env)
        raise OSError("not this time")

    monkeypatch.setattr(processes.subprocess, "Popen", starting)
    monkeypatch.delenv("SGLANG_FLASHINFER_USE_PAGED", raising=False)
    monkeypatch.setattr(
        engine, "check_one_gpu", lambda *_: processes.start([], 0, tmp_path / "log", environment={"OWN": "2"})
    )
    with pytest.raises(OSError, match="not this time"):
        engine.check_flashinfer(Record())
    assert (given["SGLANG_FLASHINFER_USE_PAGED"], given["OWN"], given["HF_HUB_OFFLINE"]) == ("1", "2", "1")


def counters(**replayed: int) -> dict:
    """As in ``/server_info``, of graphs in both phases and modes; keys are ``decode_sp`` and so on."""
    return {
        phase: {mode: {"sizes": [1, 2], "replayed": replayed.get(f"{phase}_{mode}", 0)} for mode in ("tp", "sp")}
        for phase in ("decode", "prefill")
    }


class TestReplays:
    before = counters(decode_tp=5, decode_sp=5)

    def test_all(self):
        now = counters(decode_tp=9, decode_sp=5, prefill_sp=1)
        assert comparison.replay_problems(self.before, now, "shift") == []

    def test_none_in_the_mode(self):
        now = counters(decode_tp=9, decode_sp=5, prefill_sp=1)
        assert comparison.replay_problems(self.before, now, "sp") == ["no decode replayed a graph in sp"]

    def test_only_the_phases_with_graphs(self):
        now = counters(decode_tp=9, decode_sp=5)
        now["prefill"]["sp"]["sizes"] = []
        assert comparison.replay_problems(self.before, now, "shift", ("decode",)) == []
        assert comparison.replay_problems(self.before, self.before, "shift", ("decode",)) == [
            "no decode replayed a graph in tp"
        ]

    @pytest.mark.parametrize(
        ("check", "backend", "graphs"),
        [("check_token_shards", "triton", [("decode",)]), ("check_token_shards_fa3", "fa3", [(), ("decode",)])],
    )
    def test_decodes_of_token_shards_must_replay_graphs(self, check, backend, graphs, monkeypatch, tmp_path):
        """SGLang captures them, but no graphs of prefills. Over gloo there are none at all."""
        setups = []
        monkeypatch.setattr(one_gpu, "environment", lambda backend, folder: {})
        monkeypatch.setattr(engine, "model_flags", lambda folder, **fields: [])
        monkeypatch.setattr(engine, "need_fa3", lambda: None)
        memory = SimpleNamespace(total_memory=1)
        monkeypatch.setattr(engine.torch.cuda, "get_device_properties", lambda index: memory)
        monkeypatch.setattr(ServerComparison, "run", lambda self, one, others, at_once: setups.append((self, *others)))
        getattr(engine, check)(Record(folder=tmp_path))
        (server, *others) = setups[0]
        assert [setup.graphs for setup in others] == graphs
        assert server.flags[-2:] == ["--attention-backend", backend]
        assert all(" ".join(setup.flags).startswith("--tp-size 2 --dcp-size 2 ") for setup in others)

    def test_no_backend_for_two_ranks(self, monkeypatch, tmp_path):
        """The check says why it did not run."""

        def skip(backend, folder):
            pytest.skip("NCCL is too old")

        monkeypatch.setattr(one_gpu, "environment", skip)
        monkeypatch.setattr(engine, "model_flags", lambda folder, **fields: [])
        with pytest.raises(pytest.skip.Exception, match="two ranks over nccl: skipped: NCCL is too old"):
            engine.check_token_shards(Record(folder=tmp_path))

    @pytest.mark.parametrize(("check", "pipelined"), [("check_exchange_pipeline", True), ("check_token_shards", False)])
    def test_which_servers_must_exchange_group_by_group(self, check, pipelined, monkeypatch, tmp_path):
        setups = []
        monkeypatch.setattr(one_gpu, "environment", lambda backend, folder: {})
        monkeypatch.setattr(engine, "model_flags", lambda folder, **fields: [])
        memory = SimpleNamespace(total_memory=1)
        monkeypatch.setattr(engine.torch.cuda, "get_device_properties", lambda index: memory)
        monkeypatch.setattr(ServerComparison, "run", lambda self, one, others, at_once: setups.extend(others))
        getattr(engine, check)(Record(folder=tmp_path))
        assert [setup.pipelined for setup in setups] == [pipelined]

    def test_prefills_in_sp_and_no_others_exchange_group_by_group(self):
        before, after = ({"exchange_pipeline": {"steps": steps}} for steps in (3, 5))
        for mode, prefill in (("tp", False), ("sp", True), ("shift", True)):
            assert comparison.pipelined_as_expected(before, after, mode) is prefill
            assert comparison.pipelined_as_expected(after, after, mode) is not prefill

    def test_none_captured(self):
        now = counters(decode_tp=9, prefill_tp=2)
        now["decode"]["tp"]["sizes"] = []
        assert comparison.replay_problems(self.before, now, "tp") == ["there are no graphs of a decode in tp"]

    @pytest.mark.parametrize("mode", THRESHOLDS)
    def test_graphs_are_captured_for_the_steps_that_are_expected(self, mode):
        from sglang_shift.config import ShiftConfig
        from sglang_shift.graphs.plan import plan_graphs

        plan = plan_graphs([1, 2, 4, 8, 16], ShiftConfig(2, 2, True, comparison.SHIFT[-1]))
        assert plan.sizes[Mode(EXPECTED[mode]["decode"])][-1] == REQUESTS


class TestModes:
    """Which steps the GPU check wants of a server, with graphs or without: a prompt of 1 token, and one of 700."""

    prompts = ([7], [7] * 700)

    def problems(self, mode: str, *steps: dict[str, int]) -> list[str]:
        answers = [Answer(list(range(16)), [], [], [], each) for each in steps]
        return comparison.mode_problems(answers, [*self.prompts], mode)

    @pytest.mark.parametrize(
        ("mode", "short", "long"),
        [
            ("tp", {"tp": 16, "sp": 0}, {"tp": 17, "sp": 0}),
            ("sp", {"tp": 0, "sp": 16}, {"tp": 0, "sp": 17}),
            ("shift", {"tp": 15, "sp": 1}, {"tp": 15, "sp": 2}),
            ("shift", {"tp": 16, "sp": 0}, {"tp": 16, "sp": 1}),  # a prefill of at most 16 tokens
        ],
    )
    def test_right(self, mode, short, long):
        assert self.problems(mode, short, long, short, long) == []

    def test_phases_in_the_modes_of_each_other(self):
        problems = self.problems("shift", {"tp": 1, "sp": 15}, {"tp": 2, "sp": 15})
        assert len(problems) == 2
        assert problems[1] == (
            "answer 1 took the steps {'tp': 2, 'sp': 15}, and at least {'tp': 15, 'sp': 1} were expected"
        )

    def test_a_long_prefill_in_the_wrong_mode(self):
        assert len(self.problems("shift", {"tp": 16, "sp": 0}, {"tp": 17, "sp": 0})) == 1

    def test_the_steps_are_read_from_an_answer(self):
        meta = {"output_token_logprobs": [], "output_top_logprobs": [], "shift_steps": {"tp": 3, "sp": 1}}
        assert Answer.of({"output_ids": [], "meta_info": meta}).steps == {"tp": 3, "sp": 1}


@pytest.mark.parametrize("mode", THRESHOLDS)
def test_each_threshold_gives_the_modes_that_are_expected(mode):
    asked = make_prompts(4096)
    assert len(asked) <= REQUESTS, "they are to decode at once"
    prefill = StepState(len(asked[-1]), num_prefill_tokens=len(asked[-1]))
    decode = StepState(len(asked), num_running=len(asked), padded={Mode.TP: REQUESTS})
    policy = TokenThreshold(THRESHOLDS[mode])
    assert EXPECTED[mode] == {"prefill": policy.choose(prefill).value, "decode": policy.choose(decode).value}


def test_a_log_is_quoted_by_its_last_line():
    error = ValueError("it failed; the end of a.log:\nfirst\n  last \n")
    assert explain(error) == "it failed; the end of a.log: last"
    assert explain(ValueError("one line")) == "one line" and explain(ValueError()) == "ValueError"


class TestOneGpu:
    def test_the_environment_of_gloo(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "there")
        variables = one_gpu.environment("gloo", tmp_path)
        assert variables["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "there"])
        assert variables["SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS"] == "1"
        assert not os.path.exists(variables["SGLANG_NCCL_SO_PATH"]), "a library that is not there"
        (found,) = distributions(path=[str(tmp_path)])
        (entry_point,) = found.entry_points
        assert (entry_point.group, entry_point.name) == ("sglang.srt.platforms", variables["SGLANG_PLATFORM"])

    @pytest.mark.parametrize(
        ("version", "runs"), [((2, 30, 7), True), ((3, 0), True), ((2, 28, 9), False), ((), False)]
    )
    def test_nccl_that_can_and_that_cannot(self, version, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(one_gpu, "nccl_version", lambda: version)
        if runs:
            variables = one_gpu.environment("nccl", tmp_path)
            assert variables["NCCL_MULTI_RANK_GPU_ENABLE"] == "1" and "SGLANG_NCCL_SO_PATH" not in variables
        else:
            with pytest.raises(pytest.skip.Exception, match=r"preload 2\.30 or newer"):
                one_gpu.environment("nccl", tmp_path)

    def test_sglang_takes_the_platform(self, tmp_path):
        program = (
            "from sglang.srt.platforms import current_platform as p\n"
            "from sglang.srt.distributed.parallel_state import get_default_distributed_backend as backend\n"
            "with p.reindex_device_id(1) as device:\n"
            "    print(type(p).__name__, p.is_cuda(), p.is_out_of_tree(), device, backend('cuda'))\n"
        )
        variables = os.environ | one_gpu.environment("gloo", tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == ["OneGpuPlatform", "True", "False", "0", "gloo"]
