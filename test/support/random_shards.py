"""Random weights for a model that is loaded with ``--load-format dummy``. SGLang's own are equal on all ranks."""

from __future__ import annotations

import zlib
from typing import Any

import torch


def fill(model: Any, *args: Any, **kwargs: Any) -> None:
    """Fill a model with random weights: shards differ by rank, and what is whole on each rank is equal on all ranks.

    It takes the place of SGLang's ``initialize_dummy_weights``.
    """
    from sglang.srt.runtime_context import get_parallel

    shards, rank = names_of_shards(model), get_parallel().tp_rank
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(name.encode()) + (1_000_003 * (rank + 1) if name in shards else 0)
        random = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.dim() > 1:
            random *= 1.2 * parameter.shape[-1] ** -0.5
        elif "norm" in name:
            random = 1 + 0.1 * random
        else:
            random *= 0.1
        parameter.data.copy_(random)


def names_of_shards(model: Any) -> set[str]:
    """Return the names of the parameters of which each rank has another part."""
    from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    kinds = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, FusedMoE)
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
        if not (isinstance(module, RowParallelLinear) and name == "bias")
    }
