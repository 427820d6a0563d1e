"""Models of each family with the pipelined exchange: the numbers of the ordinary exchange, and of transformers.

A trial has prompts of several lengths in one step, a second chunk with a cached prefix, and decodes. In the patterns
with TP, decodes in TP read what a pipelined prefill has written to the KV cache.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_trial import TOLERANCE, TrialError, difference, trial
from tiny_models import MODELS, TinyModel, write

MANY_HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4}
UNEVEN = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 8}
PATTERNS = ("sp", "sp-tp", "mixed")
# PyTorch's attention may round in another way for another number of heads. The largest difference seen is 1.5e-6.
ROUNDING = 1e-5


def model(name: str, fields: dict[str, int]) -> TinyModel:
    return replace(MODELS[name], fields={**MODELS[name].fields, **fields})


@pytest.mark.parametrize(
    ("name", "fields", "tp_size", "sp_size"),
    [
        ("llama3", MANY_HEADS, 2, 2),  # 8 query heads and 2 KV heads on a rank: 4 groups
        ("qwen3", UNEVEN, 2, 2),  # 6 query heads and 1 KV head: groups of 1 and 2
        pytest.param("qwen2", MANY_HEADS, 2, 2, marks=pytest.mark.full),
        pytest.param("mistral", {}, 2, 2, marks=pytest.mark.full),  # 2 query heads and 1 KV head: 2 groups
        pytest.param("phi4", {"num_attention_heads": 8}, 2, 2, marks=pytest.mark.full),
        pytest.param("llama3", MANY_HEADS, 4, 4, marks=pytest.mark.full),
        pytest.param("llama3", MANY_HEADS, 4, 2, marks=pytest.mark.full),
        pytest.param("qwen2", {**MANY_HEADS, "num_key_value_heads": 2}, 4, 2, marks=pytest.mark.full),  # replicated
    ],
)
def test_the_same_numbers(name, fields, tp_size, sp_size, tmp_path):
    expected = write(model(name, fields), str(tmp_path))
    ordinary, piped = (
        trial(
            str(tmp_path), tp_size=tp_size, sp_size=sp_size, patterns=PATTERNS,
            flags=("--shift-exchange-pipeline", value),
        ).logits
        for value in ("off", "on")
    )  # fmt: skip
    for pattern in PATTERNS:
        assert difference(piped[pattern], ordinary[pattern]) < ROUNDING, f"{pattern} differs from the ordinary exchange"
        assert difference(piped[pattern], expected) < TOLERANCE, f"{pattern} differs from transformers"


def test_a_rank_with_one_query_head_is_refused(tmp_path):
    write(MODELS["llama3"], str(tmp_path))
    with pytest.raises(TrialError, match="on is not possible, because a rank has 1 query heads for 1 KV heads"):
        trial(str(tmp_path), tp_size=4, patterns=("sp",), flags=("--shift-exchange-pipeline", "on"))
