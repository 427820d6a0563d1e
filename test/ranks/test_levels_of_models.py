"""Models at each level: one set of weights, and the logits of stock TP of the same size, also after merge and split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from model_trial import TOLERANCE, TrialError, difference, trial
from tiny_models import MODELS, TinyModel, write

FOUR_KV_HEADS = {"num_key_value_heads": 4}
FLAGS = ("--max-total-tokens", "1023")  # with the slot that holds no token, a multiple of the ranks


def of_four_ranks(name: str) -> TinyModel:
    """A model whose KV heads four ranks can divide."""
    return replace(MODELS[name], fields={**MODELS[name].fields, **FOUR_KV_HEADS})


# These have tied embeddings and biases, norms of heads, norms of all heads, a softcap, and a linear of a single part.
OF_TWO = ["llama", "qwen3", "olmo2", "gemma", "arcee", "phi3"]
OF_FOUR = ["qwen3", "llama", "glm4"]
FAST = {"llama"}


def models(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in names]


def check(model: TinyModel, levels: tuple[int, ...]) -> None:
    with TemporaryDirectory(prefix="sglang_shift_levels_") as folder:
        expected = write(model, str(Path(folder)))
        assert expected is not None and expected.std() > 0.5
        flags = (*model.flags, *FLAGS)
        stock = {size: trial(folder, tp_size=size, stock=True, flags=flags) for size in levels}
        outcome = trial(folder, tp_size=levels[-1], levels=levels, patterns=("tp", "sp", "mixed"), flags=flags)
    names = {f"{level} {name}" for level in levels if level > 1 for name in ("tp", "sp", "mixed")}
    assert set(outcome.logits) == names | {"1 tp", "walk"}
    for pattern, logits in outcome.logits.items():
        level = 1 if pattern == "walk" else int(pattern.split()[0])
        reference = stock[level].logits["tp"]
        assert difference(logits, reference) < TOLERANCE, f"{pattern} differs from stock TP"
        assert difference(logits, expected) < TOLERANCE, f"{pattern} differs from transformers"
        assert torch.equal(logits.argmax(-1), reference.argmax(-1)), f"{pattern} would choose other tokens"
    assert outcome.weight_bytes == stock[1].weight_bytes, "all levels must share exactly one copy of the weights"


@pytest.mark.parametrize("name", models(OF_TWO))
def test_two_levels(name):
    check(MODELS[name], (1, 2))


@pytest.mark.parametrize("name", models(OF_FOUR))
def test_three_levels(name):
    check(of_four_ranks(name), (1, 2, 4))


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        (MODELS["mixtral"], 2, "instances cannot share: .*experts divides experts"),
        (MODELS["deepseek_v2"], 2, "instances cannot share a KV cache of the kind MLATokenToKVPool"),
        (MODELS["llama"], 4, "the model has 2 KV heads; use at most 2 ranks"),
        (replace(MODELS["llama"], flags=("--max-total-tokens", "1024")), 2, "give it 1023 tokens"),
    ],
)
def test_what_instances_refuse(model, ranks, message, tmp_path):
    write(model, str(tmp_path))
    with pytest.raises(TrialError, match=message):
        trial(str(tmp_path), tp_size=ranks, levels=(1, ranks), flags=(*FLAGS, *model.flags))
