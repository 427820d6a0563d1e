"""The launcher refuses before it starts a process: one clear sentence, and an exit code.

In this process, but for one test: the command takes 8 s to import SGLang.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import psutil
import pytest
from harness import session_members
from sglang_shift import launch_server
from sglang_shift.errors import ShiftError
from sglang_shift.seams import digests

SHIFT = ("--tp-size", "2", "--sp-size", "2")


@dataclass
class End:
    """How the launcher ended, and what it wrote."""

    code: int
    out: str
    err: str


def assert_one_sentence(end: End, *parts: str) -> None:
    assert end.code == 2, (end.code, end.err[-3000:])
    lines = [line for line in end.err.splitlines() if line.startswith("sglang_shift: error: ")]
    assert len(lines) == 1 and "Traceback" not in end.err, end.err[-3000:]
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def launch(monkeypatch, capfd):
    """Call the launcher's ``main``, which must end without having started a process."""

    def started(*_, **__):
        pytest.fail("the launcher went on to start the server's processes")

    monkeypatch.setattr("sglang.srt.entrypoints.http_server.launch_server", started)
    monkeypatch.setattr("sglang.launch_server.run_server", started)
    # The processes that it would end are those of other tests.
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", lambda *_, **__: None)

    def call(*flags: str) -> End:
        before = psutil.Process().children(recursive=True)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            launch_server.main(list(flags))
        assert psutil.Process().children(recursive=True) == before
        return End(stop.value.code, *capfd.readouterr())

    return call


BAD_FLAGS = [
    (["--tp-size", "4", "--sp-size", "3"], ["--sp-size 3", "--tp-size 4"]),
    ([*SHIFT, "--model-path", "nobody/nothing"], ["nobody/nothing"]),
    ([*SHIFT, "--config=missing.yaml"], ["--config missing.yaml", "No such file"]),
    ([*SHIFT, "--lora-paths", '{"a": 1}'], ["lora_name"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD_FLAGS)
def test_bad_flags(launch, flags, parts):
    assert_one_sentence(launch(*flags), *parts)


def test_the_command_leaves_no_process():
    """The same as a user's command, in a process of its own: its exit code, and what is left of its session."""
    flags, parts = BAD_FLAGS[0]
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_shift.launch_server", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=300)
        assert not session_members(process.pid)
    finally:
        if members := session_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            assert members == []
    assert_one_sentence(End(process.returncode, out, err), *parts)


def test_a_model_folder_without_a_config(launch, tmp_path):
    assert_one_sentence(launch(*SHIFT, "--model-path", str(tmp_path)), str(tmp_path))


def test_unknown_flag(launch):
    end = launch("--sp-sizes", "2", "--tp-size", "2")
    assert end.code == 2 and "--sp-sizes" in end.err


def test_port_in_use(launch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_sentence(launch(*SHIFT, "--port", port), f"--port {port}", "in use")


@pytest.mark.parametrize(
    ("host", "port", "parts"),
    [
        ("127.0.0.1", 70000, ["--port 70000 is no port", "from 1 to 65535"]),
        ("127.0.0.1", -1, ["--port -1 is no port"]),
        ("a..b", 30000, ["--host a..b has no address", "empty", "give an address of this machine"]),
        ("a" * 64, 30000, ["has no address", "label too long"]),
        ("nosuch.invalid", 30000, ["--host nosuch.invalid has no address", "give an address of this machine"]),
        ("192.0.2.1", 30000, ["--host 192.0.2.1", "choose another --host, an address of this machine"]),
    ],
)
def test_where_no_server_can_listen(host, port, parts):
    with pytest.raises(ShiftError) as error:
        launch_server.check_port(host, port, node_rank=0)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    launch_server.check_port(host, port, node_rank=1)


def test_wrong_sglang_version(launch, monkeypatch):
    monkeypatch.setattr(digests, "SGLANG_VERSION", "9.9.9")
    assert_one_sentence(launch(*SHIFT), "sglang 9.9.9", "0.5.23")


def test_changed_sglang_source(launch, monkeypatch):
    monkeypatch.setitem(digests.DIGESTS, "sglang.srt.layers.linear:ColumnParallelLinear.forward", "0" * 16)
    assert_one_sentence(launch(*SHIFT), "ColumnParallelLinear.forward")


def test_help_shows_our_flags(launch):
    end = launch("--help")
    assert end.code == 0
    for flag in ("--sp-size", "--enable-shift-parallel", "--shift-policy", "--shift-threshold", "--shift-calibration"):
        assert flag in end.out
