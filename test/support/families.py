"""Makes a tiny random model of each family that the package serves, and has the flags for its tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from harness import Answer
from sglang_shift.models.demo import demo_model_path
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Family:
    """A tiny model of a family, and the layout for it.

    Attributes:
        config: Name of its configuration class in transformers.
        flags: Flags of its server. Together the families cover each layout, fixed SP and switching.
        fields: The fields that differ from the common shape.
        mode: ``sp`` if every step must be SP, or ``both`` if both modes must occur.
    """

    config: str
    flags: list[str]
    fields: dict[str, Any] = field(default_factory=dict)
    mode: str = "both"


SHIFT = ["--enable-shift-parallel", "--shift-threshold", "8"]
FAMILIES = {
    "LlamaForCausalLM": Family(
        "LlamaConfig", ["--tp-size", "2", *SHIFT], {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "MistralForCausalLM": Family("MistralConfig", ["--tp-size", "2", "--sp-size", "2"], {"head_dim": 24}, "sp"),
    "Phi3ForCausalLM": Family("Phi3Config", ["--tp-size", "2", *SHIFT], {"pad_token_id": 0}),
    # This model has biases, two KV heads on four ranks, and base-TP groups of two ranks.
    "Qwen2ForCausalLM": Family("Qwen2Config", ["--tp-size", "4", "--sp-size", "2", *SHIFT]),
    # This model has norms over the heads of Q and K.
    "Qwen3ForCausalLM": Family("Qwen3Config", ["--tp-size", "4", "--sp-size", "2"], {"head_dim": 16}, "sp"),
}

# The FFNs of this model have several pages of 2 MiB on each of four ranks, and the edges of shards are inside of pages.
WIDE = {
    "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 30_000, "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip


def make_model(path: str, family: Family) -> Any:
    """Save a random model and the demo model's tokenizer, and return the model."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    config = getattr(transformers, family.config)(
        **{
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
            # Large weights keep the logits far apart, so that rounding does not change the greedy choice.
            "initializer_range": 0.15, **family.fields,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros, the default, would hide a bias that is added twice
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> Answer:
    """Greedy decoding without a KV cache: the plainest reference."""
    tokens, logprobs = list(ids), []
    for _ in range(count):
        step = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        tokens.append(int(step.argmax()))
        logprobs.append(float(step.max()))
    return Answer(tokens[len(ids) :], logprobs, {})
