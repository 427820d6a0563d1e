"""A server with the default policy: it calibrates, chooses, and shows what it does."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from harness import Server
from prompts import assert_same_answers
from sglang_shift.modes import Mode
from sglang_shift.observe.events import StepEvent, Subscriber

pytestmark = pytest.mark.server

FLAGS = ("--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--enable-metrics")


SWITCHED = r"Switched to (SP|TP): \d+ tokens \((prefill|decode)\), \d+ running, \d+ waiting"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrated")


@pytest.fixture
def server(servers, folder, reference):
    env = {
        "SGLANG_SHIFT_CACHE_DIR": str(folder / "cache"),
        "SGLANG_SHIFT_EVENTS": f"ipc://{folder}/events",
        "SGLANG_TORCH_PROFILER_DIR": str(folder),
    }
    return servers.get(*FLAGS, env=env)


@pytest.fixture
def default_policy(server):
    yield
    server.set(shift_policy="calibrated")


@pytest.mark.full
def test_a_calibration_that_is_interrupted_leaves_nothing_behind(servers, folder):
    servers.stop()
    server = Server(list(FLAGS), env={"SGLANG_SHIFT_CACHE_DIR": str(folder / "cache")}, forked=True)
    try:
        while "Calibrating" not in server.tail():
            assert server.process.poll() is None, server.tail()
            time.sleep(0.1)
        os.killpg(server.process.pid, signal.SIGKILL)
    finally:
        server.stop()
    assert not list(folder.glob("cache/*"))


def test_the_server_calibrates_and_says_so(server, folder):
    [file] = folder.glob("cache/*.json")
    made = json.loads(file.read_text())
    tokens = {m["tokens"] for m in made["measurements"] if m["phase"] == "prefill"}
    assert min(tokens) == 1
    assert max(tokens) >= 512
    state = server.state
    assert state["costs"] == made["costs"]
    assert state["policy"].startswith("the faster mode by measured step times: prefill ")
    assert str(file) in state["calibration"]
    assert made["took"] < 90


def test_answers_are_the_reference_s(server, reference, default_policy):
    for policy in ({"shift_policy": "calibrated"}, {"shift_policy": "queue-depth", "shift_enter_requests": 6}):
        if policy["shift_policy"] == "queue-depth":
            policy["shift_leave_requests"] = 3
        server.set(**policy)
        assert_same_answers(server.generate_all(reference.prompts, 16), reference.answers[16])


def test_each_request_knows_its_steps(server, default_policy):
    server.set(shift_policy="tokens", shift_threshold=8)
    server.flush_cache()
    answer = server.generate(list(range(100, 120)), 6)
    assert answer.meta["shift_steps"] == {"tp": 5, "sp": 1}
    body = {"input_ids": list(range(300, 320)), "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
    for incremental in (False, True):
        server.flush_cache()
        with requests.post(server.url + "/generate", json={**body, "stream": True}, stream=True, timeout=60) as stream:
            chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith(b"data: {")]
        assert ["shift_steps" in c["meta_info"] for c in chunks[:-1]] == [False] * (len(chunks) - 1), incremental
        assert chunks[-1]["meta_info"]["shift_steps"] == {"tp": 4, "sp": 1}


@pytest.mark.parametrize("mode", ["tp", "sp"])
def test_the_policy_changes_at_run_time(server, default_policy, mode):
    server.set(shift_policy=mode)
    before = server.state
    server.generate_all([list(range(i, i + 50)) for i in range(8)], 8)
    after = server.state
    other = {"tp": "sp", "sp": "tp"}[mode]
    assert after["steps"][mode] > before["steps"][mode]
    assert after["steps"][other] == before["steps"][other]
    assert after["policy"] == f"every step in {mode.upper()}"


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"shift_policy": "fastest"}, 400),
        ({"shift_policy": 17}, 200),
        ({"shift_policy": "tokens", "shift_threshold": -1}, 200),
        ({"shift_threshold": 5}, 200),
        ({"shift_policy": "queue-depth", "shift_enter_requests": 2, "shift_leave_requests": 9}, 200),
        ({"shift_policy": "tokens", "shift_enter_requests": 2}, 200),
    ],
)
def test_a_change_that_makes_no_sense_changes_nothing(server, values, status):
    before = server.state["policy"]
    answer = requests.post(server.url + "/set_internal_state", json={"server_args": values}, timeout=60)
    assert answer.status_code == status
    assert status != 200 or answer.json() == [False]
    assert server.state["policy"] == before


def test_batch_lines_and_switches_in_the_log(server, default_policy):
    server.set(shift_policy="tokens", shift_threshold=8)
    deadline, i, log = time.monotonic() + 30, 0, ""
    while not re.search(SWITCHED, log) and time.monotonic() < deadline:  # at most a line in five seconds
        start = 500 + 40 * (i % 80)
        server.generate(list(range(start, start + 30)), 45)
        i, log = i + 1, server.tail(1_000_000)
    modes = re.findall(r"(Prefill|Decode) batch.*, mode: (TP|SP)", log)
    assert ("Prefill", "SP") in modes
    assert ("Decode", "TP") in modes
    assert re.search(SWITCHED, log)
    assert log.count("Switched to") < server.state["switches"], "the log is rate-limited"


def metrics(server):
    """``{(name, frozenset(labels)): value}`` of our metrics."""
    found = {}
    for line in requests.get(server.url + "/metrics", timeout=60).text.splitlines():
        if line.startswith("sglang_shift:"):
            name, labels, value = re.fullmatch(r"(\S+?)\{(.*)\} (\S+)", line).groups()
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            pairs.pop("model_name")
            found[name, frozenset(pairs.items())] = float(value)
    return found


def test_metrics_agree_with_the_counters(server, default_policy):
    server.set(shift_policy="tokens", shift_threshold=8)
    server.generate_all([list(range(i, i + 50)) for i in range(8)], 8)
    time.sleep(1.5)
    state, found = server.state, metrics(server)

    def total(name, **labels):
        return sum(v for (n, have), v in found.items() if n == "sglang_shift:" + name and set(labels.items()) <= have)

    dropped = total("events_dropped_total")
    for mode in ("tp", "sp"):
        assert total("steps_total", mode=mode) + dropped >= state["steps"][mode] >= total("steps_total", mode=mode)
        if not dropped:
            assert total("tokens_total", mode=mode) == state["tokens"][mode]
            assert total("step_time_seconds_count", mode=mode) == state["steps"][mode]
    assert total("exchanged_bytes_total") == state["exchanged_bytes"]
    assert total("exchanges_total") == state["exchanges"]
    assert total("weight_bytes", kind="base") == state["weight_bytes"]
    assert total("queue_requests") == 0
    ratio = total("measured_step_time_seconds_total") / total("predicted_step_time_seconds_total")
    assert 0.05 < ratio < 20, "predictions are of the right order, on whatever machine this is"


def test_status_page_and_view(server):
    for i in range(4):
        server.generate(list(range(i, i + 300)), 8)
    time.sleep(1.5)
    status = requests.get(server.url + "/shift/status", timeout=60).json()
    text = json.dumps(status)
    assert status["schema"] == 2
    assert server.state["policy"] in text
    page = requests.get(server.url + "/shift", timeout=60)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    view = subprocess.run(
        [sys.executable, "-m", "sglang_shift.status", server.url, "--once"], capture_output=True, text=True, check=True
    ).stdout
    assert "calibrated" in view


def test_the_page_in_a_browser_under_load(server, browser, default_policy):
    """The real page of the real server, while requests run: live figures, no console error."""
    server.set(shift_policy="tokens", shift_threshold=8)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.generate, list(range(i, i + 200)), 64) for i in range(12)]
        browser.open(server.url + "/shift", width=360, height=800)
        browser.wait("document.querySelector('#connection')?.textContent === 'live'", 30)
        # How many of the prompts a prefill holds depends on when they arrive.
        browser.wait(r"/\d+00 tokens \(prefill\)/.test(document.querySelector('#b-switches').textContent)", 30)
        for future in asked:
            future.result()
    browser.wait("/ms/.test(document.querySelector('#t-ttft').textContent)", 30)
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert "SP for steps of more than 8 tokens" in browser.evaluate("document.querySelector('#policy').textContent")
    assert browser.problems == []


def test_anyone_can_subscribe_to_the_steps(server, folder, monkeypatch):
    monkeypatch.setenv("SGLANG_SHIFT_EVENTS", f"ipc://{folder}/events")
    subscriber = Subscriber(timeout_ms=3000)
    assert subscriber.receive() is not None, "states come about once a second, also while idle"
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.generate, list(range(40, 90)), 6)
        steps = []
        while len(steps) < 6:
            event = subscriber.receive()
            assert event is not None
            if isinstance(event, StepEvent):
                steps.append(event)
        asked.result()
    subscriber.close()
    numbers = [s.step for s in steps]
    assert numbers == list(range(numbers[0], numbers[0] + 6))
    assert [s.phase for s in steps] == ["prefill"] + ["decode"] * 5
    assert steps[0].tokens == steps[0].prefill_tokens == 50
    assert all(s.seconds > 0 and s.predicted.keys() == set(Mode) and min(s.predicted.values()) > 0 for s in steps)
    [finished] = steps[-1].finished
    assert (finished.prompt_tokens, finished.output_tokens) == (50, 6)
    assert sum(finished.steps.values()) == 6
    assert 0 < finished.ttft < finished.e2e


def test_profiler_spans_carry_the_mode(server, folder, default_policy):
    server.set(shift_policy="tokens", shift_threshold=8)
    server.post("/start_profile", {"output_dir": str(folder), "num_steps": 4, "activities": ["CPU"]})
    server.generate(list(range(700, 740)), 8)
    deadline = time.monotonic() + 60
    while not (traces := list(Path(folder).rglob("*.json.gz"))) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(1)
    with gzip.open(traces[0], "rt") as trace:
        spans = set(re.findall(r"sglang_shift \w+ step", trace.read()))
    assert spans == {"sglang_shift sp step", "sglang_shift tp step"}


@pytest.mark.full
def test_a_drifted_calibration_is_renewed_while_the_server_idles(servers, folder, reference, tmp_path):
    """Lap by lap, with slots of the real pool. Requests that arrive meanwhile are answered as ever."""
    [file] = folder.glob("cache/*.json")
    text = re.sub(r'"seconds": ([0-9.e-]+)', lambda m: f'"seconds": {float(m[1]) / 20}', file.read_text())
    wrong = json.loads(text)
    for curve in (curve for by_mode in wrong["costs"]["curves"].values() for curve in by_mode.values()):
        curve["values"] = [seconds / 20 for seconds in curve["values"]]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(wrong))
    server = servers.get(*FLAGS, "--shift-calibration", str(own), env={"SGLANG_SHIFT_CACHE_DIR": str(folder / "cache")})
    assert str(own) in server.state["calibration"]
    deadline = time.monotonic() + 300
    while "calibrating again" not in server.tail(1_000_000) and time.monotonic() < deadline:
        server.generate(list(range(1000, 1600)), 200)
    answers = []
    while "sglang_shift: calibrated in" not in server.tail(1_000_000) and time.monotonic() < deadline:
        answers.append(server.generate(reference.prompts[len(answers) % 8], 8))
        time.sleep(0.5)
    assert len(answers) > 4, "it was done between requests"
    for i, answer in enumerate(answers):
        assert answer.tokens == reference.answers[1][i % 8].first(8).tokens
    renewed = json.loads(own.read_text())
    assert len(renewed["measurements"]) >= len(wrong["measurements"])
    assert renewed["made"] > wrong["made"]
    assert server.state["costs"] == renewed["costs"]
    after, before = (c["costs"]["curves"]["decode"]["tp"]["values"][0] for c in (renewed, wrong))
    assert after / before > 5, "the times are those of this machine again"
    assert "leak" not in server.tail(1_000_000)
    assert "Traceback" not in server.tail(1_000_000)
