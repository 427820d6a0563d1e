"""Switching at every step, and closed formulas for what an SP step communicates and holds."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import SUPPORT
from two_layers import two_layer_model

pytestmark = [pytest.mark.server, pytest.mark.full]

FLOAT = 4  # bytes
CONFIG = json.loads(Path(two_layer_model(), "config.json").read_text())
LAYERS, HIDDEN, HEAD = CONFIG["num_hidden_layers"], CONFIG["hidden_size"], CONFIG["head_dim"]
HEADS, KV_HEADS = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]


@pytest.fixture(scope="module", params=[(2, 2), (4, 2)], ids=lambda p: f"P{p[0]}-S{p[1]}")
def deployment(request, reference, servers):
    world, sp = request.param
    server = servers.get(
        "--dtype", "float32", "--tp-size", str(world), "--sp-size", str(sp), "--enable-shift-parallel",
        "--shift-calibration", "off",
        module=[str(SUPPORT / "instrumented_server.py")],
    )  # fmt: skip
    return server, world, sp


def shard_widths(world: int) -> tuple[int, int]:
    """(Q + K + V, O) columns of one rank's full-TP shard."""
    heads, kv_heads = HEADS // world, max(1, KV_HEADS // world)
    return (heads + 2 * kv_heads) * HEAD, heads * HEAD


def test_flipping_at_every_step_for_500_steps(deployment, reference):
    """Random traffic, rank-consensus check on (the harness sets it): nothing hangs, nothing differs."""
    server, _, _ = deployment
    generator = random.Random(0)
    prompts, expected = [], []
    for _ in range(96):
        i = generator.randrange(len(reference.prompts))
        prompts.append((reference.prompts[i], generator.choice([1, 4, 8]), generator.random() * 0.05))
        expected.append(reference.answers[1][i])

    def ask(prompt):
        ids, count, pause = prompt
        time.sleep(pause)
        return server.generate(ids, count)

    before = server.state
    steps, answers = 0, []
    while steps < 500:
        server.flush_cache()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, prompts))
        for answer, reference_answer in zip(answers, expected, strict=True):
            n = len(answer.tokens)
            assert answer.tokens == reference_answer.tokens[:n]
            pairs = zip(answer.logprobs, reference_answer.logprobs, strict=False)
            assert max(abs(a - b) for a, b in pairs) < 1e-4
        after = server.state
        steps = sum(after["steps"].values()) - sum(before["steps"].values())
    assert after["switches"] - before["switches"] >= steps - 1
    assert abs(after["steps"]["tp"] - after["steps"]["sp"]) <= 1


def test_bytes_of_an_sp_step(deployment):
    """Exchanged bytes equal (S - 1) * ceil(T / S) * (Q + K + V + O widths) * 4 a layer and rank."""
    server, world, sp = deployment
    qkv, out = shard_widths(world)
    for length in (1, 2, 7, 200):
        server.flush_cache()
        before = server.state
        server.generate([17 + i for i in range(length)], 1)
        server.generate([1017 + i for i in range(length)], 1)  # of two prefills one is SP, the other TP
        after = server.state
        assert after["steps"]["sp"] - before["steps"]["sp"] == 1
        expected = LAYERS * (sp - 1) * -(-length // sp) * (qkv + out) * FLOAT
        assert after["exchanged_bytes"] - before["exchanged_bytes"] == expected
        assert after["exchanges"] - before["exchanges"] == 2 * LAYERS


def test_collectives_of_an_sp_step(deployment):
    """Two exchanges a layer and the embedding's; with a base-TP group its sum, and two all-reduces a layer.

    Of short prompts: the parts of a large exchange go past SGLang's groups, whose collectives are counted.
    """
    server, world, sp = deployment
    before = server.state["counts"]
    for i in range(4):
        server.generate([217 + i + j for j in range(20)], 8)
    after = server.state["counts"]
    sp_counts, tp_counts = (Counter(after[mode]) - Counter(before[mode]) for mode in ("sp", "tp"))
    assert sp_counts["forwards"] > 0 < tp_counts["forwards"]
    per_step = 1 + 2 * LAYERS
    assert sp_counts["all_reduce"] == (per_step * sp_counts["forwards"] if world > sp else 0)
    assert sp_counts["all_to_all_single"] == per_step * sp_counts["forwards"]
    assert "reduce_scatter_tensor" not in sp_counts
    assert tp_counts["all_reduce"] == per_step * tp_counts["forwards"]
    assert "all_to_all_single" not in tp_counts
    # The LM head's gather of logits, as in TP, and one of hidden states at the exit.
    gathers = ("all_gather_into_tensor", "all_gather")
    exit_and_head = sum(sp_counts.get(name, 0) for name in gathers) / sp_counts["forwards"]
    head = sum(tp_counts.get(name, 0) for name in gathers) / tp_counts["forwards"]
    assert exit_and_head == head + 1


def test_one_copy_of_the_weights(deployment):
    """Every TP weight is a view of its base weight, and the bytes are those of the base configuration."""
    server, world, sp = deployment
    state, t = server.state, world // sp
    facts = state["weights"]
    assert facts["projections"] == facts["views"] == facts["values"] == 4 * LAYERS
    kv_rows = 2 * max(1, KV_HEADS // t) * HEAD
    qkv = HIDDEN * (HEADS // t * HEAD + kv_rows)
    mlp = 3 * HIDDEN * CONFIG["intermediate_size"] // t
    base = LAYERS * (qkv + HIDDEN * HEADS // t * HEAD + mlp + 2 * HIDDEN) + HIDDEN
    embedding = CONFIG["vocab_size"] * HIDDEN // world
    replicated = LAYERS * HIDDEN * (sp * 2 * max(1, KV_HEADS // world) * HEAD - kv_rows)
    assert state["weight_bytes_beyond_base"] == replicated * FLOAT
    assert replicated == 0 or world > KV_HEADS
    assert state["weight_bytes"] == (base + embedding + replicated) * FLOAT
    assert facts["parameter_storage_bytes"] == state["weight_bytes"], "no storage besides the parameters' own"
