"""The whole benchmark, small, against real servers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import psutil
import pytest

pytestmark = [pytest.mark.server, pytest.mark.full]


def test_smoke(servers, tmp_path):
    servers.stop()
    command = [sys.executable, "-m", "sglang_shift.benchmark", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--", "--sleep-on-idle"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["contender"], row["workload"].split()[0]) for row in rows} == {
        (c, w) for c in ("stock-tp", "shift:tokens") for w in ("single", "saturated", "rate")
    }
    assert all(float(row["errors"]) == 0 for row in rows)
    visits = [json.loads(line) for line in (tmp_path / "visits.jsonl").read_text().splitlines()]
    shift = [v["shift"] for v in visits if v["contender"] == "shift:tokens"]
    assert all(v["shift"] is None for v in visits if v["contender"] == "stock-tp")
    assert all(counts["tp_steps"] > 0 for counts in shift)
    asked = {v["contender"]: [(r["prompt"], r["output"]) for r in v["requests"]] for v in visits}
    assert asked["stock-tp"] == asked["shift:tokens"], "the same requests, answered in full"
    assert "saturated" in done.stdout and (tmp_path / "plots").is_dir()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]

    again = subprocess.run([*command, "--report"], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
