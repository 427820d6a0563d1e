"""Makes a Llama with random weights. Its answers mean nothing. Its steps take as long as those of a real model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sglang_shift.models.demo import demo_model_path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_random_model(folder: Path, *, seed: int = 0, **sizes: Any) -> int:
    """Write a Llama in bfloat16 with the demo model's tokenizer.

    Args:
        folder: Folder to write.
        seed: Seed of the weights.
        sizes: Arguments of transformers' ``LlamaConfig``. The vocabulary is that of the demo model.

    Returns:
        The number of parameters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = Path(demo_model_path())
    torch.manual_seed(seed)
    vocabulary = LlamaConfig.from_pretrained(demo).vocab_size
    config = LlamaConfig(vocab_size=vocabulary, dtype=torch.bfloat16, **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (demo / name).exists():
            shutil.copy(demo / name, folder / name)
    return sum(p.numel() for p in model.parameters())
