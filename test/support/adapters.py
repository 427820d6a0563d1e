"""Writes random LoRA adapters in the file format of peft, and merges them into models of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING = "embed_tokens"


def write_adapter(
    folder: Path, model: torch.nn.Module, rank: int, seed: int, targets: tuple[str, ...] = LINEARS, size: float = 0.5
) -> str:
    """Write an adapter for a model of transformers, and return its folder.

    Args:
        folder: The folder to write. It is made.
        model: The model that the adapter is for.
        rank: The rank of the adapter.
        seed: The seed of its weights.
        targets: The last parts of the names of the modules that it changes.
        size: The norm of a change, as a share of the norm of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in targets:
            continue
        weight = module.weight.detach()
        outputs, inputs = weight.shape
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        b *= size * float(weight.norm() / (b @ a).norm()) / 2  # the scaling of the adapter is 2
        if isinstance(module, torch.nn.Embedding):  # the table is [vocabulary, hidden], and peft transposes both
            a, b = b.T.contiguous(), a.T.contiguous()
            names = ("lora_embedding_A", "lora_embedding_B")
        else:
            names = ("lora_A.weight", "lora_B.weight")
        tensors |= {f"base_model.model.{name}.{part}": tensor for part, tensor in zip(names, (a, b), strict=True)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def merge_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """Add an adapter to the weights of a model, and return the model.

    If the adapter changes an embedding, the LM head keeps its weight.
    """
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    for name, module in model.named_modules():
        pair = [tensors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB"]
        embedding = [tensors.get(f"base_model.model.{name}.lora_embedding_{part}") for part in "AB"]
        if pair[0] is not None:
            module.weight.data = module.weight.data + 2 * (pair[1] @ pair[0])
        elif embedding[0] is not None:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone())
            module.weight.data = module.weight.data + 2 * (embedding[1] @ embedding[0]).T
    return model
