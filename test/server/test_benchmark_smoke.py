"""The whole benchmark, small, against real servers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import psutil
import pytest
from sglang_shift.tools.benchmark import command

pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.fixture
def benchmark(forked_launches, capsys, monkeypatch):
    """Runs the benchmark with words of its command line, and returns what it prints."""
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)

    def run(*words):
        code = command.main(words)
        out, err = capsys.readouterr()
        assert code == 0, err[-4000:]
        return out

    return run


def test_smoke(benchmark, tmp_path):
    words = ["--smoke", "--out", str(tmp_path)]
    printed = benchmark(*words)
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
    assert "saturated" in printed and (tmp_path / "plots").is_dir()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]

    again = [sys.executable, "-m", "sglang_shift.benchmark", *words, "--report"]
    assert subprocess.run(again, capture_output=True, text=True, check=True).stdout == printed


def test_instances_beside_replicas(benchmark, tmp_path):
    """The pools hold 512 tokens for each rank, so replicas refuse the long prompts, and instances merge for them."""
    words = ["--out", str(tmp_path), "--rounds", "1",
               "--contenders", "stock-dp", "instances:2:paper", "--workloads", "mixed-lengths", "closed-loop",
               "--kv-tokens", "1024", "--prompt", "16", "64", "--output", "2", "4", "--saturated", "6",
               "--long-shares", "0.02", "--long-prompt", "600", "700", "--mixed-rate", "0.3", "--mixed-seconds", "6",
               "--clients", "4", "--closed-seconds", "4"]  # fmt: skip
    benchmark(*words)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(row["contender"], row["workload"]): row for row in csv.DictReader(file)}
    stock, ours = (rows[name, "mixed-lengths 2%"] for name in ("stock-dp", "instances:2:paper"))
    assert float(stock["long/rejected"]) == float(stock["long/requests"]) == float(ours["long/requests"]) > 0
    assert (ours["long/rejected"], ours["errors"], stock["errors"]) == ("", "0", "0")
    assert float(ours["merges"]) > 0 and float(ours["merge_exchange_s"]) > 0 and float(ours["at_level_1"]) > 0
    loops = [row for (_, workload), row in rows.items() if workload == "closed-loop"]
    assert len(loops) == 2 and all(float(row["completed_tokens_per_s"]) > 0 for row in loops)
