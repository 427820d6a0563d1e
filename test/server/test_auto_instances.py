"""--instance-policy auto on a server: it calibrates each level, and the times decide when instances change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
from harness import Server
from prompts import assert_same_answers
from sglang_shift.cost.model import PHASES, CostModel, Curve
from sglang_shift.modes import MODES

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = (
    "--dtype", "float32", "--tp-size", "2", "--instances", "2", "--enable-shift-parallel", "--instance-policy", "auto",
    "--max-total-tokens", "1024", "--max-running-requests", "16", "--chunked-prefill-size", "128", "--sleep-on-idle",
    "--enable-metrics",
)  # fmt: skip
SECONDS = 180  # a wait that takes longer hangs
MERGED, SPLIT = [2], [1, 1]


def line(start_ms: float, slope_ms: float) -> Curve:
    return Curve((1, 1000), (1e-3 * start_ms, 1e-3 * (start_ms + 1000 * slope_ms)))


def table(decode: Curve) -> dict[str, Any]:
    """Step times in which prompts take hardly any time, and both modes are equal."""
    curves = {phase: dict.fromkeys(MODES, decode if phase == "decode" else line(1, 0.001)) for phase in PHASES}
    costs = CostModel(curves, dict.fromkeys(PHASES, Curve((1,), (1.0,))), dict.fromkeys(PHASES, 0.0), 0.0)
    decoded: dict[str, Any] = json.loads(msgspec.json.encode(costs))
    return decoded


TABLES = {1: table(line(50, 0.1)), 2: table(line(5, 10))}
"""One request is faster on both ranks. Two replicas decode more tokens a second: at most 314 beside 98."""


def report(server: Server) -> dict[str, Any]:
    """What ``GET /shift/instances`` says."""
    found: dict[str, Any] = requests.get(server.url + "/shift/instances", timeout=60).json()
    return found


def levels(server: Server) -> list[int]:
    return [each["level"] for each in report(server)["instances"]]


def wait(server: Server, layout: list[int], meanwhile: Callable[[], object] = lambda: time.sleep(0.2)) -> None:
    """Wait until the instances have a layout."""
    deadline = time.monotonic() + SECONDS
    while levels(server) != layout:
        assert time.monotonic() < deadline, json.dumps(report(server), indent=1)
        meanwhile()


@pytest.fixture(scope="module")
def files(servers, reference, tmp_path_factory) -> dict[int, Path]:
    """The calibration file of each level. A server has written them, and still runs."""
    folder = tmp_path_factory.mktemp("auto")
    files = {level: folder / f"own.{level}.json" for level in (1, 2)}
    start(servers, files)
    return files


def start(servers: Any, files: dict[int, Path]) -> Server:
    named = files[1].with_name("own.json")
    server: Server = servers.get(*FLAGS, "--shift-calibration", str(named))
    return server


def test_each_level_is_calibrated(servers, reference, files):
    server = start(servers, files)
    for level, file in files.items():
        assert json.loads(file.read_text())["key"]["level"] == level
    assert "calibrated at level 1 in" in server.tail(1_000_000)
    answers = server.generate_all(reference.prompts[:8], 4)
    assert [each.tokens for each in answers] == [each.tokens for each in reference.answers[1][:8]]
    servers.stop()


def test_the_tables_decide(servers, reference, files):
    """The second start reads the files, in which other times stand now."""
    servers.stop()
    for level, file in files.items():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"costs": TABLES[level]}))
    server = start(servers, files)
    assert "calibrated at level" not in server.tail(1_000_000)
    few, short = list(range(100, 130)), [ids for ids in reference.prompts if len(ids) < 300]

    # A long request merges at once. Then a request at a time keeps the ranks merged.
    long = next(i for i, ids in enumerate(reference.prompts) if 600 < len(ids) < 1000)
    assert levels(server) == SPLIT
    assert_same_answers([server.generate(reference.prompts[long], 8)], [reference.answers[16][long]])
    assert levels(server) == MERGED
    assert "needs" in report(server)["last"][-1]["why"]
    for _ in range(10):
        server.generate(few, 8)
    assert levels(server) == MERGED
    assert server.state["costs"] == TABLES[2], "the modes of the merged instance are chosen by its own times"

    # Many short requests split it.
    def flood() -> None:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda ids: server.generate(ids, 64), (short * 4)[:32]))
        assert all(len(each.tokens) == 64 for each in answers)

    wait(server, SPLIT, flood)
    last = report(server)["last"][-1]
    assert last["ok"] and last["why"].startswith("the policy auto: 1+1 takes"), last
    assert set(report(server)["policy"]["predictions"]) == {"1+1", "2"}
    places = [i for i, ids in enumerate(reference.prompts) if len(ids) + 8 < 500]
    answers = server.generate_all([reference.prompts[i] for i in places], 8)
    assert_same_answers(answers, [reference.answers[16][i] for i in places])

    # Few requests at a time merge it again, because they are served sooner.
    tokens = server.generate(few, 8).tokens
    wait(server, MERGED, lambda: (server.generate(few, 8), time.sleep(0.5)))
    assert server.generate(few, 8).tokens == tokens
    text = requests.get(server.url + "/metrics", timeout=60).text
    assert "sglang_shift:instance_predicted_seconds{" in text and 'layout="1+1"' in text
