"""A server with LoRA adapters: steps without an active adapter run in both modes, and compute the model itself."""

from __future__ import annotations

import pytest
import torch
import trial_script
from adapters import EMBEDDING, LINEARS, write_adapter
from model_trial import TOLERANCE, difference, trial
from tiny_models import MODELS, build, write

# The tiny vocabulary is odd, and SGLang divides the weights of an adapter of the LM head among the ranks.
TARGETS = (*LINEARS, EMBEDDING, "lm_head")


@pytest.mark.parametrize(("tp_size", "sp_size"), [(2, 2), (4, 2)])
def test_steps_without_an_adapter(tp_size, sp_size, tmp_path):
    model, folder = MODELS["llama"], str(tmp_path / "model")
    expected = write(model, folder)
    adapter = write_adapter(tmp_path / "adapter", build(model), rank=4, seed=1, targets=TARGETS)
    outcome = trial(folder, tp_size=tp_size, sp_size=sp_size, flags=("--lora-paths", f"a={adapter}"))
    assert set(outcome.logits) == set(trial_script.PATTERNS)
    for pattern, logits in outcome.logits.items():
        assert difference(logits, expected) < TOLERANCE, pattern
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), pattern
