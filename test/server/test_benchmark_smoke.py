"""The whole benchmark, small, against real servers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import psutil
import pytest
from harness import FORKED_LAUNCHER

pytestmark = [pytest.mark.server, pytest.mark.full]

FORKED_BENCHMARK = f"""
import sys
from sglang_shift.tools import servers
servers.LAUNCHER = {FORKED_LAUNCHER!r}
from sglang_shift.tools.benchmark.command import main
sys.exit(main(sys.argv[1:]))
"""
"""The benchmark with servers that start in less time. The other test starts them by the user's command."""


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


def test_instances_beside_replicas(servers, tmp_path):
    """The pools hold 512 tokens for each rank, so replicas refuse the long prompts, and instances merge for them."""
    servers.stop()
    command = [sys.executable, "-c", FORKED_BENCHMARK, "--out", str(tmp_path), "--rounds", "1",
               "--contenders", "stock-dp", "instances:2:paper", "--workloads", "mixed-lengths", "closed-loop",
               "--kv-tokens", "1024", "--prompt", "16", "64", "--output", "2", "4", "--saturated", "6",
               "--long-shares", "0.02", "--long-prompt", "600", "700", "--mixed-rate", "0.3", "--mixed-seconds", "6",
               "--clients", "4", "--closed-seconds", "4"]  # fmt: skip
    done = subprocess.run([*command, "--", "--sleep-on-idle"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(row["contender"], row["workload"]): row for row in csv.DictReader(file)}
    stock, ours = (rows[name, "mixed-lengths 2%"] for name in ("stock-dp", "instances:2:paper"))
    assert float(stock["long/rejected"]) == float(stock["long/requests"]) == float(ours["long/requests"]) > 0
    assert (ours["long/rejected"], ours["errors"], stock["errors"]) == ("", "0", "0")
    assert float(ours["merges"]) > 0 and float(ours["merge_exchange_s"]) > 0 and float(ours["at_level_1"]) > 0
    loops = [row for (_, workload), row in rows.items() if workload == "closed-loop"]
    assert len(loops) == 2 and all(float(row["completed_tokens_per_s"]) > 0 for row in loops)
