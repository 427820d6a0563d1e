"""Decode graphs of models with images, on two ranks: in both modes they compute the eager results.

Their positions have three dimensions, and graphs keep them in buffers of their own.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from recorded_graphs import recorded_steps, run_model_ranks
from sglang.benchmark.one_batch import decode, extend, prepare_synthetic_inputs_for_latency_test
from sglang_shift.modes import Mode
from tiny_models import MODELS, write

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = [
    *("--cuda-graph-bs-decode", "1", "2", "4", "--attention-backend", "recorded", "--skip-tokenizer-init"),
    *("--max-total-tokens", "1024", "--max-running-requests", "8", "--enable-shift-parallel"),
    *("--shift-policy", "queue-depth"),
]
PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15]]


def steps(runner, mode, graphs):
    """A prefill and two decode steps in a mode: the logits, and whether a graph was replayed."""
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    without_graphs = nullcontext() if graphs else runner.graphs.without()
    with recorded_steps(runner) as (logits, replayed), runner.running_in(mode), without_graphs:
        run(runner)
    return torch.cat(logits), replayed


def run(runner):
    ids, _, batch = extend(prepare_synthetic_inputs_for_latency_test(len(PROMPTS), 0, PROMPTS), runner)
    for _ in range(2):
        ids, _ = decode(ids, batch, runner)


def check(runner):
    assert runner.model.is_mrope_enabled
    assert runner.graphs.captured_sizes()["decode"] == {"tp": [1, 2, 4], "sp": [2, 4]}
    expected, replayed = steps(runner, Mode.TP, False)
    assert replayed == [False] * 3
    for mode in Mode:
        logits, replayed = steps(runner, mode, True)
        assert replayed == [False, True, True]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_decode_graphs(name, tmp_path):
    write(MODELS[name], str(tmp_path))
    run_model_ranks(2, check, ["--model-path", str(tmp_path), *FLAGS])
