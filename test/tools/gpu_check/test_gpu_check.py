"""The GPU check's command with made-up checks: independence, failures, time limits, skips, table, files, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import made_up_checks
import psutil
import pytest
from harness import REPO
from sglang_shift.errors import ShiftError
from sglang_shift.tools import nvidia_smi
from sglang_shift.tools.gpu_check import checks, command, environment, isolation, memory, processes, report
from sglang_shift.tools.gpu_check.catalogue import checks_of
from sglang_shift.tools.gpu_check.isolation import CheckResult, Isolation
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.tables import text_table

NO_GPU = "there is none"
CHECKS = checks_of(checks)


@pytest.fixture
def _made_up(monkeypatch):
    monkeypatch.setattr(command, "MODULE", made_up_checks)


def run(tmp_path: Path, *names: str, gpus: int = 1, seconds: float = 300) -> list[CheckResult]:
    """The results of made-up checks, in their order."""
    chosen = [check for check in checks_of(made_up_checks) if check.name in names]
    assert len(chosen) == len(names)
    reporter = report.Reporter(tmp_path, {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(command, "MODULE", made_up_checks)
        code = command.run(chosen, Isolation(gpus, NO_GPU, seconds, tmp_path), reporter, tmp_path / "junit.xml")
    assert code == report.exit_code(reporter.results)
    assert [result.name for result in reporter.results] == [check.name for check in chosen]
    return reporter.results


def test_no_failure_stops_the_rest(tmp_path):
    names = ("passes", "raises", "crashes", "aborts", "skips", "finds-problems", "passes-too")
    results = run(tmp_path, *names)
    statuses = ["passed", "failed", "failed", "failed", "skipped", "failed", "passed"]
    assert [r.status for r in results] == statuses
    assert [r.reason for r in results][:2] == ["", "RuntimeError: out of memory"]
    assert results[2].reason.startswith("it ended with exit code -11: about to crash (")
    assert results[3].reason.startswith("it ended with exit code -6: terminate called after throwing an instance of")
    assert [r.reason for r in results][4:6] == [
        "there is no kernel for this",
        "the first thing is wrong (and 1 more)",
    ]
    # What was found until then is kept.
    assert [r.record.rows for r in results[:2]] == [[{"size": 8, "us": 1.5}], [{"size": 16}]]
    assert results[2].record.rows[0]["size"] == 32 and results[3].record.notes == ["so far, so good"]
    assert results[0].record.notes == ["all is well"] and len(results[5].record.problems) == 2
    assert "Traceback" in (tmp_path / "raises.log").read_text()
    assert "in test_crashes" in (tmp_path / "crashes.log").read_text(), "where it crashed"
    # The same in junit's XML.
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert [case.get("name") for case in suite] == ["test_" + name.replace("-", "_") for name in names]
    told = {"passed": None, "failed": "failure", "skipped": "skipped"}
    for case, result in zip(suite, results, strict=True):
        ends = {end.tag: end.get("message") for end in case if end.tag != "properties"}
        assert ends == ({} if result.status == "passed" else {told[result.status]: result.reason})
        assert float(case.get("time")) == pytest.approx(result.seconds, abs=0.002)
    notes = [(p.get("name"), p.get("value")) for p in suite[0].iter("property")]
    assert notes == [("note", "all is well")]


def test_a_check_that_hangs_ends_with_all_that_it_started(tmp_path):
    hung, after = run(tmp_path, "hangs", "passes-too")
    assert hung.status == "failed" and hung.reason == "it took longer than 6 s"
    assert hung.record.notes == ["it could clean up"]
    assert not psutil.pid_exists(hung.record.rows[0]["pid"])
    assert after.status == "passed"
    assert "time.sleep(1000)" in (tmp_path / "hangs.log").read_text(), "where it hung"


def test_a_hang_that_no_signal_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    hung, after = run(tmp_path, "hangs-in-a-kernel", "passes-too")
    assert hung.status == "failed" and hung.reason == "it took longer than 6 s"
    assert not psutil.pid_exists(hung.record.rows[0]["pid"])
    assert after.status == "passed"


def test_a_hang_without_pytest_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:timeout")
    hung, after = run(tmp_path, "hangs", "passes-too")
    assert hung.status == "failed" and hung.reason == "it took longer than 6 s"
    assert hung.record.notes == ["it could clean up"]
    assert after.status == "passed"


def test_a_server_and_its_check_have_logs_of_their_own(tmp_path, monkeypatch):
    """Both would write the same file from its start, each over what the other wrote."""
    logs = []

    def serving(flags, port, log, *more):
        logs.append(log)
        raise ShiftError("it does not start")

    monkeypatch.setattr(memory, "find_spec", lambda name: name)
    monkeypatch.setattr(memory, "model_flags", lambda folder: (folder / "model").mkdir() or [])
    monkeypatch.setattr(memory, "serving", serving)
    with pytest.raises(ShiftError, match="does not start"):
        memory.check(Record(folder=tmp_path))
    assert logs and not {log.name for log in logs} & {f"{check.name}.log" for check in CHECKS}


def test_what_a_crash_leaves_behind_is_ended(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (crashed,) = run(tmp_path, "crashes")
        assert crashed.status == "failed" and not psutil.pid_exists(crashed.record.rows[0]["pid"])
        assert other.poll() is None, "no process of the check's"
    finally:
        other.kill()
        other.wait()


def test_a_check_that_the_time_for_all_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(isolation, "MIN_START_SECONDS", 1.0)
    cut, late = run(tmp_path, "hangs-long", "passes-too", seconds=16)
    assert cut.status == "failed"
    assert cut.reason == "the 16 s for all checks ended it; give more --minutes, or --only hangs-long"
    assert cut.record.rows and late.status == "skipped"


def test_what_cannot_run_is_skipped_and_says_why(tmp_path):
    names = ("passes", "needs-two")
    assert [(r.status, r.reason) for r in run(tmp_path, *names, gpus=0)] == [("skipped", NO_GPU)] * 2
    one, other = run(tmp_path, *names, gpus=1)
    assert one.status == "passed"
    assert (other.status, other.reason) == ("skipped", "it needs 2 GPUs, and there is 1")
    seconds = processes.GRACE_SECONDS + isolation.MIN_START_SECONDS - 1
    (late,) = run(tmp_path, "passes", seconds=seconds)
    assert late.status == "skipped" and late.reason.startswith(f"too little is left of the {seconds:.0f} s")


def test_a_check_of_several_ranks(tmp_path):
    (result,) = run(tmp_path, "has-ranks")
    assert (result.status, result.record.rows) == ("passed", [{"ranks": 2}]), result.reason


def test_figures_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path):
    (tmp_path / "skips.jsonl").write_text('{"row": {"old": 1}}\n{"end": {"status": "passed", "reason": ""}}\n')
    (result,) = run(tmp_path, "skips")
    assert result.status == "skipped" and result.record.rows == []


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["passed", "skipped"], 0),
        (["passed", "failed"], 1),
        (["skipped", "failed"], 1),
        (["skipped", "skipped"], 2),
        ([], 2),
    ],
)
def test_exit_codes(statuses, code):
    assert report.exit_code([CheckResult("x", status) for status in statuses]) == code


@pytest.mark.usefixtures("_made_up")
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "gpus", lambda: 1)
    assert command.main(["--only", "skips", "passes", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["passes"], ["skips"], ["raises"])] == [
        ["passes", "passed"],
        ["skips", "skipped"],
    ], "those asked for, in the order of the checks"
    assert "    all is well" in printed and "    there is no kernel for this" in printed
    assert "1 passed, 0 failed, 1 skipped" in printed
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(c["name"], c["status"], c["reason"]) for c in kept["checks"]] == [
        ("passes", "passed", ""),
        ("skips", "skipped", "there is no kernel for this"),
    ]
    assert kept["checks"][0]["figures"] == [{"size": 8, "us": 1.5}] and kept["checks"][0]["seconds"] > 0
    assert {"GPUs", "torch", "flashinfer-python", "sglang", "triton", "NCCL", "Python"} <= set(kept["environment"])
    assert command.main(["--only", "raises", "--out", str(tmp_path)]) == 1
    assert command.main(["--only", "skips", "--out", str(tmp_path)]) == 2


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "gpus", lambda: 0)
    assert command.main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().out
    assert printed.count("no CUDA GPU: PyTorch") == len(CHECKS)
    assert f"0 passed, 0 failed, {len(CHECKS)} skipped" in printed


@pytest.mark.parametrize("has_all", [True, False])
def test_the_script(has_all, tmp_path):
    """It takes a Python that has what is needed, without a set-up, which takes a network; else the one of .venv."""
    script = tmp_path / "scripts" / "gpu_check.sh"
    found, made = tmp_path / "bin" / "python3", tmp_path / ".venv" / "bin" / "python"
    says = '#!/bin/sh\n[ "$1" = -c ] && {{ echo "Traceback\nNo pytest" >&2; exit {code}; }}\n'
    says += 'echo {name} "$PYTHONPATH" "$@"\n'
    for path, text in {
        script: (REPO / "scripts" / "gpu_check.sh").read_text(),
        script.with_name("setup.sh"): "#!/bin/sh\necho set up\n",
        found: says.format(code=0 if has_all else 1, name="found"),
        made: says.format(code=0, name="made"),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    variables = {"PATH": f"{found.parent}{os.pathsep}/usr/bin{os.pathsep}/bin", "PYTHONPATH": "bundle"}
    done = subprocess.run([script, "--list"], env=variables, capture_output=True, text=True, check=True)
    ours = f"{tmp_path}/python:{tmp_path}/kernels:bundle"
    said = [f"found {ours}"] if has_all else ["set up", "made bundle"]
    said[-1] += " -m sglang_shift.gpu_check --list"
    assert done.stdout.splitlines() == said
    why = "sglang_shift: python3 cannot run the checks (No pytest), so .venv runs them\n"
    assert done.stderr == ("" if has_all else why)


@pytest.mark.parametrize(("gpus", "words", "minutes"), [(1, [], 20), (4, [], 30), (4, ["--minutes", "3"], 3)])
def test_the_time_for_all(gpus, words, minutes, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(environment, "gpus", lambda: gpus)
    monkeypatch.setattr(command, "Isolation", lambda n, why, seconds, out: given.append((n, seconds)))
    monkeypatch.setattr(command, "run", lambda *_: 0)
    command.main(["--out", str(tmp_path), *words])
    assert given == [(gpus, 60 * minutes)]


@pytest.mark.parametrize(("number", "version"), [(23007, (2, 30, 7)), (22809, (2, 28, 9)), (2804, (2, 8, 4))])
def test_the_version_of_nccl(number, version):
    assert environment.decode_nccl_version(number) == version


def test_without_pytest():
    program = (
        "import runpy, sys; sys.modules['pytest'] = None; runpy.run_module('sglang_shift.gpu_check', None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    said = "sglang_shift: error: the GPU checks need pytest: pip install 'sglang-shift[gpu-check]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_a_name_that_is_none(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "nonsense"])
    assert ended.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_the_list(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(CHECKS) and all(c.text in line for c, line in zip(CHECKS, printed[1:], strict=True))


def test_every_check_is_there(monkeypatch):
    """Each test runs a check of its own, all of which exist."""
    from sglang_shift.tools.gpu_check import (
        attention,
        dispatch,
        engine,
        exchange,
        gemms,
        graphs,
        kernels,
        links,
        memory,
        quantized,
        steps,
    )

    ran, record = [], Record()
    for module in (attention, dispatch, engine, exchange, gemms, graphs, kernels, links, memory, quantized, steps):
        for name in [name for name in vars(module) if name.startswith("check")]:
            monkeypatch.setattr(module, name, lambda given, at=(module, name): ran.append((at, given)))
    for check in CHECKS:
        getattr(checks, check.function)(record)
    assert len({at for at, _ in ran}) == len(ran) == len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(given is record for _, given in ran) and all(check.text.endswith(".") for check in CHECKS)


def test_the_table():
    assert text_table([("a", "bytes"), ("long", 7)]) == "a     bytes\nlong      7"
    result = CheckResult("gemms", "failed", "x is wrong", 3.21)
    result.record.problems += ["x is wrong", "y too"]
    result.record.notes += ["a note", "a table\nof two lines"]
    assert report.line(result).splitlines() == [
        "gemms              failed      3.2 s",
        "    x is wrong",
        "    y too",
        "    a note",
        "    a table",
        "    of two lines",
    ]


def test_a_table_of_many_problems():
    result = CheckResult("engine", "failed", "0 is wrong (and 8 more)")
    result.record.problems += [f"{i} is wrong" for i in range(9)]
    result.record.notes.append("a note")
    shown = [line.strip() for line in report.line(result).splitlines()[1:]]
    assert shown == [
        "0 is wrong (and 8 more)",
        *(f"{i} is wrong" for i in range(1, 6)),
        "and 3 more in gpu_check.json",
        "a note",
    ]


def test_a_problem_from_before_an_exception():
    result = CheckResult("engine", "failed", "RuntimeError: out of memory")
    result.record.problems.append("0 is wrong")
    assert "    0 is wrong" in report.line(result).splitlines()


def test_a_tool_that_does_not_answer(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(nvidia_smi, "LIMIT_SECONDS", 0.2)
    assert nvidia_smi.nvidia_smi("name") == []


def test_versions_that_are_not_there():
    assert environment.version_of("sglang") and environment.version_of("no-such-package") is None
    assert sys.version.startswith(environment.describe()["Python"])
