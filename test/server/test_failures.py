"""What goes wrong at start-up or while serving: one clear sentence, an exit code, no process left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from harness import Server, free_port

LAUNCH = ["-m", "sglang_shift.launch_server"]


def launch(*flags: str, module: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end; afterwards nothing of its session may be alive."""
    process = subprocess.Popen(
        [sys.executable, *(module or LAUNCH), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=300)
        assert not session_members(process.pid)
    finally:
        if members := session_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            assert members == []
    return subprocess.CompletedProcess(flags, process.returncode, out, err)


def session_members(session: int) -> list[int]:
    """Live processes of a session, zombies not counted."""
    members = []
    for p in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(p.pid) == session and p.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(p.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def left_after_a_while(session: int) -> list[int]:
    """Processes of a session that do not end within a minute after its leader, as killed ranks should."""
    deadline = time.monotonic() + 60
    while (members := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return members


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("sglang_shift: error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tp-size", "4", "--sp-size", "3"], ["--sp-size 3", "--tp-size 4"]),
        (["--tp-size", "2", "--sp-size", "2", "--model-path", "nobody/nothing"], ["nobody/nothing"]),
        (["--tp-size", "2", "--sp-size", "2", "--config=missing.yaml"], ["--config missing.yaml", "No such file"]),
        (["--tp-size", "2", "--sp-size", "2", "--lora-paths", '{"a": 1}'], ["lora_name"]),
    ],
)
def test_bad_flags(flags, parts):
    assert_one_sentence(launch(*flags), *parts)


def test_a_model_folder_without_a_config(tmp_path):
    assert_one_sentence(launch("--tp-size", "2", "--sp-size", "2", "--model-path", str(tmp_path)), str(tmp_path))


def test_unknown_flag():
    done = launch("--sp-sizes", "2", "--tp-size", "2")
    assert done.returncode == 2 and "--sp-sizes" in done.stderr


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_sentence(launch("--tp-size", "2", "--sp-size", "2", "--port", port), f"--port {port}", "in use")


def test_wrong_sglang_version():
    code = (
        "from sglang_shift import launch_server; from sglang_shift.seams import digests; "
        "digests.SGLANG_VERSION = '9.9.9'; "
        "launch_server.main(['--tp-size', '2', '--sp-size', '2'])"
    )
    assert_one_sentence(launch(module=["-c", code]), "sglang 9.9.9", "0.5.23")


def test_changed_sglang_source():
    code = (
        "from sglang_shift import launch_server; from sglang_shift.seams import digests; "
        "digests.DIGESTS['sglang.srt.layers.linear:ColumnParallelLinear.forward'] = '0' * 16; "
        "launch_server.main(['--tp-size', '2', '--sp-size', '2'])"
    )
    assert_one_sentence(launch(module=["-c", code]), "ColumnParallelLinear.forward")


@pytest.mark.server
def test_sglang_serve_and_nodes_started_differently(servers):
    """Two nodes of one rank each, on this machine, through `sglang serve`; their thresholds differ."""
    servers.stop()
    rendezvous = f"127.0.0.1:{free_port()}"
    common = ["--tp-size", "2", "--nnodes", "2", "--dist-init-addr", rendezvous, "--enable-shift-parallel"]
    module = [str(Path(sys.executable).parent / "sglang"), "serve"]
    nodes = [
        Server([*common, "--node-rank", str(rank), "--shift-threshold", str(100 + rank)], module=module)
        for rank in (0, 1)
    ]
    try:
        for node in nodes:
            assert node.process.wait(300) != 0
        logs = "".join(node.tail(20_000) for node in nodes)
        assert "--shift-threshold is 100 on rank 0 and 101 on rank 1" in logs
        assert not any(left_after_a_while(node.process.pid) for node in nodes)
    finally:
        for node in nodes:
            node.stop()


SERVER = ["--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-threshold", "8"]


@pytest.mark.server
def test_two_servers_on_one_machine_and_one_is_told_to_end_under_load(servers):
    """SIGTERM lets running requests finish and leaves no process; the other server does not notice."""
    first, ids = servers.get(*SERVER), list(range(50, 80))
    expected = first.generate(ids, 8).tokens
    second = Server(SERVER, forked=True)
    try:
        second.wait_ready()
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(second.generate, [*ids, i], 150) for i in range(8)]
            assert second.generate(ids, 8).tokens == first.generate(ids, 8).tokens == expected
            second.process.send_signal(signal.SIGTERM)
            assert [len(future.result(timeout=120).tokens) for future in running] == [150] * 8
        second.process.wait(120)
        assert not left_after_a_while(second.process.pid)
        assert first.generate(ids, 8).tokens == expected
    finally:
        second.stop()


@pytest.mark.server
def test_a_rank_that_dies_takes_the_server_down(servers):
    """A killed rank ends the server with an error, and all running requests with it: no hang."""
    server = servers.get(*SERVER)
    children = psutil.Process(server.process.pid).children(recursive=True)
    rank = next(p for p in children if "scheduler_TP1" in " ".join(p.cmdline()))
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.generate, list(range(50, 200 + i)), 3800) for i in range(8)]
        time.sleep(1)
        rank.kill()
        for future in running:
            with pytest.raises((requests.RequestException, AssertionError)):
                future.result(timeout=120)
    assert server.process.wait(120) != 0
    assert not left_after_a_while(server.process.pid)
    servers.stop()
