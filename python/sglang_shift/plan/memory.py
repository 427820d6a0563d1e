"""What a GPU's memory holds: weights, what Shift needs beyond TP, activations and graphs, and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.layout import RankLayout
from sglang_shift.plan.hardware import Gpu
from sglang_shift.plan.model import Model
from sglang_shift.sizing import MIB, kv_bytes_per_token, padded_vocab, weight_bytes

# SGLang's default reserve, handle_gpu_memory_settings in srt/arg_groups/memory_hook.py, for GPUs of more than 60 GiB.
LEAST_RESERVE = 10 * 1024  # MiB, as all that follow
META_DATA, PER_CHUNK_TOKEN, PER_RANK, PER_GRAPH_BATCH = 512, 1.5, 128, 2
SMALLEST_CHUNK = 2048


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU's memory.

    Attributes:
        weights: The full-TP shard.
        shift: What the base configuration needs beside it: the rest of the base weights, which both modes share,
            and the graphs of a second mode.
        reserve: Activations and graphs, as SGLang reserves them.
        kv_per_token: K and V of a token.
        total: All of it.
    """

    weights: int
    shift: int
    reserve: int
    kv_per_token: int
    total: int

    @property
    def pool(self) -> int:
        """What is left for the KV cache; negative where the rest does not fit."""
        return self.total - self.weights - self.shift - self.reserve

    @property
    def tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return max(0, self.pool) // self.kv_per_token


def memory(model: Model, gpu: Gpu, layout: RankLayout, chunk: int, kv_dtype: str = "bfloat16") -> Memory:
    """A GPU's memory.

    Args:
        model: The model.
        gpu: The GPU.
        layout: Of its replica.
        chunk: Prompt tokens that one step takes.
        kv_dtype: ``bfloat16`` or ``fp8``.
    """
    ranks, sp = layout.world_size, layout.sp_size
    weights = _weights(model, ranks, 1)
    batch = 256 if ranks < 4 else 512  # the largest with a graph, SGLang's default for these GPUs
    graphs = PER_GRAPH_BATCH * batch
    rest = META_DATA + PER_CHUNK_TOKEN * max(chunk, SMALLEST_CHUNK) + PER_RANK * ranks + graphs
    shift = _weights(model, ranks, sp) - weights + graphs * MIB if sp > 1 else 0
    per_token = kv_bytes_per_token(model.config, ranks, 1 if kv_dtype == "fp8" else 2)
    return Memory(weights, shift, int(max(LEAST_RESERVE, rest) * MIB), per_token, gpu.memory_mib * MIB)


def _weights(model: Model, ranks: int, sp: int) -> int:
    """Bytes of the base weights of S = ``sp``; embeddings and LM head are never quantized."""
    if not model.quantized:
        return weight_bytes(model.config, ranks, sp, 2)
    vocabulary = padded_vocab(model.vocabulary, ranks) // ranks * model.layer.hidden * (1 if model.tied else 2)
    return weight_bytes(model.config, ranks, sp, 1) + vocabulary
