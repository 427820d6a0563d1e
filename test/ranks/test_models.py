"""Every architecture in every mode, against transformers: tiny checkpoints through SGLang's loaders, over gloo.

``tiny_models`` has the checkpoints, and ``model_trial`` runs them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from model_trial import TOLERANCE, Outcome, TrialError, difference, trial
from sglang_shift.models.demo import demo_model_path
from tiny_models import MODELS, write

SERVED = [name for name, model in MODELS.items() if not model.stock]
WITH_REFERENCE = [name for name in SERVED if not MODELS[name].dummy]
IN_SP = [name for name in SERVED if not MODELS[name].refused]
# These have rope scaling, caps and windows, sinks and biased experts, latents, and multipliers.
FAST = {"llama3", "gemma2", "gpt_oss", "deepseek_v3", "granitemoe"}

# For the models that SP serves, TP is compared with transformers by the tests of every mode, too.
IN_STOCK = [name for name in WITH_REFERENCE if name in FAST or name not in IN_SP]

# The other tests let all ranks divide each expert.
EXPERT_PARALLEL = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.full)]


def models(names: list[str], fast: bool = True) -> list[Any]:
    """Return parameters: a few models in the fast tier, and all in the full tier."""
    return [pytest.param(name, marks=[] if fast and name in FAST else pytest.mark.full) for name in names]


class Checkpoints:
    """Writes each checkpoint once, and keeps the logits that its trials should have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, torch.Tensor | None] = {}

    def get(self, name: str) -> tuple[str, torch.Tensor | None]:
        """Return the folder of the checkpoint, and the expected logits if transformers has the model."""
        folder = self.folder / name
        if name not in self.expected:
            self.expected[name] = write(MODELS[name], str(folder))
        return str(folder), self.expected[name]


@pytest.fixture(scope="module")
def checkpoints():
    with TemporaryDirectory(prefix="sglang_shift_tiny_") as folder:
        yield Checkpoints(Path(folder))


def check(outcome: Outcome, expected: torch.Tensor | None) -> None:
    """Check all patterns of modes against transformers, and against TP on the same ranks, if they ran it."""
    tp = outcome.logits.get("tp", expected)
    assert tp is not None, "there is nothing to compare with"
    expected = tp if expected is None else expected
    assert expected.std() > 0.5, "these logits are too close to each other"
    for pattern, logits in outcome.logits.items():
        assert difference(logits, expected) < TOLERANCE, f"{pattern} differs from transformers"
        assert difference(logits, tp) < TOLERANCE, f"{pattern} differs from TP"
        assert torch.equal(logits.argmax(-1), tp.argmax(-1)), f"{pattern} would choose other tokens than TP"


@pytest.mark.parametrize("name", models(IN_STOCK))
def test_stock_tp_equals_transformers(name, checkpoints):
    folder, expected = checkpoints.get(name)
    check(trial(folder, tp_size=2, stock=True, flags=MODELS[name].flags), expected)


# The others run on four ranks. A trial takes most of its time to start.
TWO_RANKS = [name for name in IN_SP if name in FAST or name in ("mistral", "qwen2", "qwen3", "phi3")]


@pytest.mark.parametrize("name", models(TWO_RANKS))
def test_every_mode_equals_transformers(name, checkpoints):
    folder, expected = checkpoints.get(name)
    check(trial(folder, tp_size=2, sp_size=2, flags=MODELS[name].flags), expected)


# With S = 2, the SP groups and the base-TP groups of four ranks have two ranks each: what S = 4 and P = 2 do is in it.
FOUR_RANKS = [(name, sp_size) for name in IN_SP for sp_size in (2, 4) if sp_size == 2 or name in FAST]


@pytest.mark.full
@pytest.mark.parametrize(("name", "sp_size"), FOUR_RANKS)
def test_every_mode_of_four_ranks_equals_transformers(name, sp_size, checkpoints):
    folder, expected = checkpoints.get(name)
    check(trial(folder, tp_size=4, sp_size=sp_size, patterns=("tp", "sp", "mixed"), flags=MODELS[name].flags), expected)


@pytest.mark.parametrize(("tp_size", "sp_size"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", EXPERT_PARALLEL)
def test_every_mode_with_whole_experts_on_each_rank(name, tp_size, sp_size, checkpoints):
    """``--ep-size``: a rank has some experts, and of each expert all or a larger part."""
    folder, expected = checkpoints.get(name)
    flags = (*MODELS[name].flags, "--ep-size", "2")
    check(trial(folder, tp_size=tp_size, sp_size=sp_size, flags=flags), expected)


# Rounding to fp8 turns a difference in the last bit of a key into one of 6 %, if the key is between two numbers.
FP8_TOLERANCE = 0.05


@pytest.mark.parametrize("name", ["llama3", pytest.param("minicpm3", marks=pytest.mark.full)])
def test_every_mode_with_a_cache_in_fp8(name, checkpoints):
    """Heads and latents. Every mode rounds the same keys and values, so it is compared with TP."""
    folder, expected = checkpoints.get(name)
    logits = trial(folder, tp_size=2, flags=(*MODELS[name].flags, "--kv-cache-dtype", "fp8_e4m3")).logits
    assert difference(logits["tp"], expected) > FP8_TOLERANCE, "the cache is not in fp8"
    for pattern, mine in logits.items():
        assert difference(mine, logits["tp"]) < FP8_TOLERANCE, f"{pattern} differs from TP"


LATENTS_BY_TOKEN = [
    ("deepseek_v3", 2, 2, 2),
    pytest.param("deepseek_v2", 4, 4, 4, marks=pytest.mark.full),
    pytest.param("minicpm3", 4, 2, 4, marks=pytest.mark.full),
    pytest.param("glm4_moe_lite", 4, 4, 2, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "tp_size", "sp_size", "shards"), LATENTS_BY_TOKEN)
def test_latents_that_ranks_divide_by_token(name, tp_size, sp_size, shards, checkpoints):
    """SGLang's layers would move queries and latents themselves. The CPU platform's backend does it for them."""
    folder, expected = checkpoints.get(name)
    flags = (*MODELS[name].flags, "--dcp-size", str(shards))
    check(trial(folder, tp_size=tp_size, sp_size=sp_size, patterns=("tp", "sp", "mixed"), flags=flags), expected)


@pytest.mark.full
def test_eight_ranks_divide_heads_by_token():
    """The demo model has 8 heads and 2 KV heads, so four ranks hold the same KV head."""
    stock = trial(demo_model_path(), tp_size=1, stock=True).logits["tp"]
    for sp_size in (8, 2):
        flags, patterns = ("--dcp-size", "auto"), ("tp", "sp", "mixed")
        check(trial(demo_model_path(), tp_size=8, sp_size=sp_size, patterns=patterns, flags=flags), stock)


@pytest.mark.parametrize("name", models([name for name in SERVED if MODELS[name].refused], fast=False))
def test_a_model_is_refused_for_its_reason(name, checkpoints):
    folder, _ = checkpoints.get(name)
    with pytest.raises(TrialError, match=MODELS[name].refused):
        trial(folder, tp_size=2)


@pytest.mark.parametrize("name", models([name for name, model in MODELS.items() if model.stock], fast=False))
def test_stock_does_not_serve_the_others(name, checkpoints):
    """If SGLang or the CPU platform learns to serve a model, its record should say so."""
    folder, expected = checkpoints.get(name)
    try:
        outcome = trial(folder, tp_size=2, stock=True, flags=MODELS[name].flags)
    except TrialError:
        return
    assert expected is not None, f"{name} is served now: empty its field `stock`"
    assert difference(outcome.logits["tp"], expected) >= TOLERANCE, f"{name} is served now: empty its field `stock`"
