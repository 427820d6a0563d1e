"""Every file of examples/ runs as its first lines say, with the demo model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from harness import REPO, SUPPORT

pytestmark = [pytest.mark.server, pytest.mark.full]

EXAMPLES = REPO / "examples"
FLAGS = (
    "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-policy", "custom_policy:BusyOrLong",
)  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_offline_inference(servers):
    servers.stop()  # it would take the engine's cores
    # As all servers of the tests, with forked ranks: they need not import SGLang again.
    out = run(str(SUPPORT / "forked_server.py"), str(EXAMPLES / "offline_inference.py"))
    steps = [{k: int(n) for k, n in re.findall(r"'(tp|sp)': (\d+)", s)} for s in re.findall(r"^steps: (.*)", out, re.M)]
    assert len(steps) == 3
    assert all(request["tp"] > 0 for request in steps)
    assert steps[2]["sp"] >= 1, "its prompt is longer than the threshold"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    return f"ipc://{tmp_path_factory.mktemp('examples')}/events"


@pytest.fixture(scope="module")
def server(servers, endpoint):
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    return servers.get(*FLAGS, env={"PYTHONPATH": path, "SGLANG_SHIFT_EVENTS": endpoint})


def test_custom_policy_event_subscriber_and_frontend_program(server, endpoint, monkeypatch):
    assert server.state["policy"] == "SP for at least 4 requests or more than 48 prompt tokens, else TP"
    monkeypatch.setenv("SGLANG_SHIFT_EVENTS", endpoint)
    # A shell starts programs in the background with SIGINT ignored, and the watcher would inherit that.
    command = ["env", "--default-signal=INT", sys.executable, str(EXAMPLES / "event_subscriber.py")]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    too_late = threading.Timer(120, watcher.kill)
    too_late.start()
    try:
        assert watcher.stdout.readline() == "waiting for changes of mode\n"
        before = server.state["steps"]
        out = run(str(EXAMPLES / "frontend_program.py"), server.url)
        assert len(re.findall(r"-> (?:path|None)$", out, re.M)) == 6
        server.generate([*range(100, 200)], 2)  # SP for its prompt, TP after it: a change for certain
        after = server.state["steps"]
        assert after["tp"] > before["tp"] and after["sp"] > before["sp"]
        lines = [watcher.stdout.readline(), watcher.stdout.readline()]
        for line in lines:
            assert re.fullmatch(r"step \d+: (TP|SP) for \d+ tokens \(\d+ requests, \d+ prompt tokens\)\n", line)
        watcher.send_signal(signal.SIGINT)
        _, errors = watcher.communicate(timeout=60)
        assert (watcher.returncode, errors) == (0, "")
    finally:
        too_late.cancel()
        watcher.kill()
        watcher.communicate()


def test_all_examples_are_run():
    names = {file.name for file in EXAMPLES.glob("*.py")}
    assert names == {"offline_inference.py", "custom_policy.py", "event_subscriber.py", "frontend_program.py"}
