"""What a decoder layer costs in Python: nothing beyond stock SGLang in TP, and no more than TP in SP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import json, sys
sys.path.insert(0, "benchmark")
import calls_per_layer
import model_trial
import sglang.srt.managers.scheduler
model_trial.save_time()
print("counts", json.dumps(calls_per_layer.per_layer(calls_per_layer.LLAMA)))
"""


@pytest.mark.full
def test_a_layer_makes_no_more_calls_than_stock():
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("counts ")), None)
    assert line is not None, done.stderr[-3000:]
    counts = json.loads(line.removeprefix("counts "))
    assert counts["TP"] == counts["stock TP"], "a TP step runs exactly SGLang's code"
    calls, operators = counts["SP"]
    assert calls <= counts["TP"][0], "the exchange and the projections take the place of longer paths of SGLang"
    assert operators <= counts["TP"][1] + 17, "two exchanges with gloo, in place of two all-reduces"
