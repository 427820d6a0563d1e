"""A server with LoRA adapters: steps without an active adapter run in both modes, and compute the model itself."""

from __future__ import annotations

import pytest
import torch
import trial_script
from adapters import EMBEDDING, LINEARS, merge_adapter, write_adapter
from model_trial import TOLERANCE, difference, trial
from tiny_models import MODELS, build, write

TARGETS = (*LINEARS, EMBEDDING)


@pytest.mark.parametrize(("tp_size", "sp_size"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.full)])
def test_steps_without_an_adapter(tp_size, sp_size, tmp_path):
    """The adapter changes each layer, also the LM head, so SGLang has wrapped all of them."""
    model, folder = MODELS["llama"], str(tmp_path / "model")
    expected = write(model, folder)
    adapter = write_adapter(tmp_path / "adapter", build(model), rank=4, seed=1, targets=(*TARGETS, "lm_head"))
    outcome = trial(folder, tp_size=tp_size, sp_size=sp_size, flags=("--lora-paths", f"a={adapter}"))
    assert set(outcome.logits) == set(trial_script.PATTERNS)
    for pattern, logits in outcome.logits.items():
        assert difference(logits, expected) < TOLERANCE, pattern
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), pattern


def test_steps_with_an_adapter(tmp_path):
    """Steps with the adapter run in TP, and compute the model with merged weights."""
    model, folder = MODELS["llama"], str(tmp_path / "model")
    bare = write(model, folder)
    adapter = write_adapter(tmp_path / "adapter", build(model), rank=4, seed=1, targets=TARGETS)
    merged = merge_adapter(build(model), adapter)
    expected = trial_script.reference(
        merged.config.vocab_size, lambda tokens: merged(torch.tensor([tokens]), use_cache=False).logits[0]
    )
    outcome = trial(folder, tp_size=2, patterns=("tp",), flags=("--lora-paths", f"a={adapter}"), adapter=True)
    assert difference(outcome.logits["tp"], expected) < TOLERANCE
    assert difference(bare, expected) > 0.1
