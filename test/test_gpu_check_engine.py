"""The GPU check's comparison of servers, on the CPU; and its platform that puts two ranks on one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from importlib.metadata import distributions

import pytest
from sglang_shift.benchmark.servers import Server, serving
from sglang_shift.demo import demo_model_path
from sglang_shift.gpu_check import engine, one_gpu
from sglang_shift.gpu_check.answers import prompts
from sglang_shift.gpu_check.engine import EXPECTED, REQUESTS, THRESHOLDS, Comparison, explained
from sglang_shift.gpu_check.record import Record, Skip
from sglang_shift.modes import StepState
from sglang_shift.policies import TokenThreshold


@pytest.fixture
def two_ranks_kept(monkeypatch):
    """A server of two ranks is started once; the next comparison meets it again."""
    started: list[Server] = []

    @contextmanager
    def keeping(flags, *args):
        if flags[flags.index("--tp-size") + 1] != "2":
            with serving(flags, *args) as server:
                yield server
            return
        if not started:
            started.append(stack.enter_context(serving(flags, *args)))
        yield started[0]

    with ExitStack() as stack:
        monkeypatch.setattr(engine, "serving", keeping)
        yield


@pytest.mark.server
@pytest.mark.usefixtures("two_ranks_kept")
def test_two_ranks_answer_as_one(servers, tmp_path):
    servers.stop()
    record = Record(folder=tmp_path)
    flags = ["--model-path", demo_model_path(), "--dtype", "float32", "--max-total-tokens", "16384"]
    flags += ["--chunked-prefill-size", "512", "--max-running-requests", str(REQUESTS)]
    comparison = Comparison(record, "cpu", flags, vocabulary=4096, tolerance=1e-4)
    comparison.take_reference([])
    comparison.run("two ranks", ["--tp-size", "2"])
    assert record.problems == []
    rows = record.rows[1:]
    assert [row["mode"] for row in rows] == ["tp", "sp", "shift"]
    for row in rows:
        assert row["tokens"] == 2 * 12 * 16 and row["ties"] == 0 and row["exchange"] == "collective"
    # Answers that are another's are told apart.
    comparison.reference = comparison.reference[::-1]
    comparison.tolerance = 0.1
    comparison.run("two ranks", ["--tp-size", "2"])
    assert record.problems and "two ranks, tp: " in record.problems[0]


@pytest.mark.server
def test_a_server_that_does_not_start(servers, tmp_path):
    servers.stop()
    record = Record(folder=tmp_path)
    comparison = Comparison(record, "cpu", ["--model-path", demo_model_path()], vocabulary=4096, tolerance=1e-4)
    comparison.run("three ranks", ["--tp-size", "3"])
    (problem,) = record.problems
    assert problem.startswith("three ranks: the server ended with exit code 2")
    assert "--tp-size 3 does not divide" in problem
    assert (tmp_path / "engine-cpu-three-ranks.log").exists()


@pytest.mark.parametrize("mode", THRESHOLDS)
def test_each_threshold_gives_the_modes_that_are_expected(mode):
    asked = prompts(4096)
    assert len(asked) <= REQUESTS, "they are to decode at once"
    prefill = StepState(len(asked[-1]), num_prefill_tokens=len(asked[-1]))
    decode = StepState(len(asked), num_running=len(asked), bucket=REQUESTS)
    policy = TokenThreshold(THRESHOLDS[mode])
    assert {policy.choose(step).value for step in (prefill, decode)} == EXPECTED[mode]


def test_a_log_is_quoted_by_its_last_line():
    error = ValueError("it failed; the end of a.log:\nfirst\n  last \n")
    assert explained(error) == "it failed; the end of a.log: last"
    assert explained(ValueError("one line")) == "one line" and explained(ValueError()) == "ValueError"


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
            with pytest.raises(Skip, match=r"preload 2\.30 or newer"):
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
