"""Each level has its own attention backend and CUDA graphs: they are replayed there, and give the eager results."""

from __future__ import annotations

import pytest
import torch
from families import WIDE, Family, make_model
from level_trial import check_groups
from recorded_graphs import run_model_ranks
from sglang_shift.instances.levels import Levels
from sglang_shift.modes import Mode
from sglang_shift.runtime.level_switch import LevelSwitch
from test_graphs import eager, run

pytestmark = pytest.mark.full

FLAGS = (
    "--cuda-graph-bs-decode", "1", "2", "3", "4", "6", "--cuda-graph-bs-prefill", "4", "8", "13", "24",
    "--cuda-graph-backend-prefill", "breakable", "--attention-backend", "recorded", "--max-total-tokens", "2047",
    "--max-running-requests", "8", "--enable-shift-parallel", "--shift-policy", "queue-depth", "--instances", "4",
)  # fmt: skip
DECODES, PREFILLS = {"tp": [1, 2, 3, 4, 6]}, {"tp": [4, 8, 13, 24]}
BATCHES = ([5], [7, 1, 3], [1, 2, 1, 3, 1, 2, 1, 1])  # most levels have no decode graph for the last one
WALK = (2, 4, 1, 2)  # each level after another one than before its capture
NARROW = {"num_key_value_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 2048}


def close(a, b):
    """At each level, sums of up to 30,000 products have another order."""
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def sizes(level, tp_only):
    """The sizes of the graphs of a level: those of SP are multiples of its ranks."""
    if tp_only:
        return {"decode": {**DECODES, "sp": []}, "prefill": {**PREFILLS, "sp": []}}
    sp = {2: ([2, 4, 6], [4, 8, 14, 24]), 4: ([4, 8], [4, 8, 16, 24])}[level]
    return {"decode": {**DECODES, "sp": sp[0]}, "prefill": {**PREFILLS, "sp": sp[1]}}


def check_levels(runner, frees):
    assert runner.graphs.captured_sizes() == {}, "graphs of the world before its levels are known are never replayed"
    switch = LevelSwitch(runner, Levels((1, 2, 4)), frees=frees)
    parts = [(e.attributes["attn_backend"], e.attributes["graphs"]) for e in switch.executions.values()]
    assert len({id(part) for pair in parts for part in pair}) == 6, "no level has what another level has"
    before = runner.decode_cuda_graph_runner
    runner.init_decode_cuda_graph()
    assert runner.decode_cuda_graph_runner is before, "a weight update moves no weights, so no graph is captured again"
    switch.enter(1)
    reference = [run(runner, eager(runner, Mode.TP), lengths, decodes=1)[0] for lengths in BATCHES]
    for level in WALK:
        switch.enter(level)
        check_groups(runner, switch)
        tp_only = level == 1 or frees
        assert runner.graphs.captured_sizes() == sizes(level, tp_only)
        for mode in Mode:
            if tp_only and mode is Mode.SP:
                continue
            for lengths, expected in zip(BATCHES, reference, strict=True):
                logits, replayed = run(runner, runner.running_in(mode), lengths, decodes=1)
                largest = runner.graphs.captured_sizes()["decode"][mode.value][-1]
                assert replayed == [True, len(lengths) <= largest], (level, mode, lengths)
                assert all(map(close, logits, expected)), (level, mode, lengths)


@pytest.fixture
def model(tmp_path, weights) -> str:
    make_model(str(tmp_path), Family("LlamaConfig", [], WIDE if weights == "free" else NARROW))
    return str(tmp_path)


@pytest.mark.parametrize("weights", ["keep", "free"])
def test_graphs_of_all_levels_give_the_eager_results(weights, model):
    run_model_ranks(4, check_levels, ["--model-path", model, *FLAGS, "--merge-weights", weights], weights == "free")
