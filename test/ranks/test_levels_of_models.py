"""Models at each level: one set of weights, and the logits of stock TP of the same size, also after merge and split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from model_trial import TOLERANCE, TrialError, difference, trial
from sglang_shift.models.sizes import padded_vocab
from tiny_models import MODELS, TinyModel, configuration, write

FOUR_KV_HEADS = {"num_key_value_heads": 4}
FLAGS = ("--max-total-tokens", "1023")  # with the slot that holds no token, a multiple of the ranks


def of_four_ranks(name: str) -> TinyModel:
    """A model whose KV heads four ranks can divide."""
    return replace(MODELS[name], fields={**MODELS[name].fields, **FOUR_KV_HEADS})


# These have tied embeddings and biases, norms of heads, norms of all heads, a softcap, and a linear of a single part.
OF_TWO = ["llama", "qwen3", "olmo2", "gemma", "arcee", "phi3"]
OF_FOUR = ["llama", "glm4"]
FAST = {"llama"}


def models(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in names]


def table_bytes(model: TinyModel) -> int:
    """The bytes of the embedding and the LM head, with the rows that pad the vocabulary."""
    fields = configuration(model).to_dict()
    tables = 1 if fields["tie_word_embeddings"] else 2
    return 4 * tables * padded_vocab(fields["vocab_size"], 1) * fields["hidden_size"]


def check(model: TinyModel, levels: tuple[int, ...], sp_size: int | None = None) -> None:
    ranks, sp_size = levels[-1], sp_size or levels[-1]
    width = ranks // sp_size
    with TemporaryDirectory(prefix="sglang_shift_levels_") as folder:
        expected = write(model, str(Path(folder)))
        assert expected is not None and expected.std() > 0.5
        flags = (*model.flags, *FLAGS)
        stock = {size: trial(folder, tp_size=size, stock=True, flags=flags) for size in {*levels, width}}
        patterns = ("tp", "sp", "mixed")
        outcome = trial(folder, tp_size=ranks, sp_size=sp_size, levels=levels, patterns=patterns, flags=flags)
    names = {f"{level} {name}" for level in levels if level > width for name in patterns}
    assert set(outcome.logits) == names | {f"{level} tp" for level in levels if level <= width} | {"walk"}
    for pattern, logits in outcome.logits.items():
        level = levels[0] if pattern == "walk" else int(pattern.split()[0])
        reference = stock[level].logits["tp"]
        assert difference(logits, reference) < TOLERANCE, f"{pattern} differs from stock TP"
        assert difference(logits, expected) < TOLERANCE, f"{pattern} differs from transformers"
        assert torch.equal(logits.argmax(-1), reference.argmax(-1)), f"{pattern} would choose other tokens"
    if width == 1:
        assert outcome.weight_bytes == stock[1].weight_bytes, "all levels must share exactly one copy of the weights"
    else:
        tables = table_bytes(model)
        expected_bytes = stock[width].weight_bytes + tables - tables // width
        assert outcome.weight_bytes == expected_bytes, "a rank has its part of the linears, and the whole tables"


@pytest.mark.parametrize("name", models(OF_TWO))
def test_two_levels(name):
    check(MODELS[name], (1, 2))


@pytest.mark.parametrize("name", models(OF_FOUR))
def test_three_levels(name):
    check(of_four_ranks(name), (1, 2, 4))


def of_eight_ranks(name: str) -> TinyModel:
    """A model whose heads eight ranks can divide."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return replace(MODELS[name], fields={**MODELS[name].fields, **heads})


@pytest.mark.parametrize("name", models(["llama"]))
def test_weights_that_two_ranks_divide(name):
    check(of_four_ranks(name), (2, 4), sp_size=2)


@pytest.mark.full
def test_weights_that_two_ranks_of_eight_divide():
    """At the level between, a rank has heads that are not neighbours in the model."""
    check(of_eight_ranks("qwen3"), (2, 4, 8), sp_size=4)


@pytest.mark.full
def test_norms_of_all_heads_need_their_order(tmp_path):
    model = of_four_ranks("olmo2")
    write(model, str(tmp_path))
    with pytest.raises(
        TrialError, match=r"_norm has weights for all heads together, but with --sp-size 2 .*; give --sp-size 4"
    ):
        trial(str(tmp_path), tp_size=4, sp_size=2, levels=(2, 4), flags=(*FLAGS, *model.flags))


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
