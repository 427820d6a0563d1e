"""Computes what a GPU's memory holds: weights, what Shift needs beyond TP, activations, graphs and KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from sglang.srt.arg_groups.cuda_graph_hook import generate_prefill_cuda_graph_batch_sizes
from sglang.srt.arg_groups.overrides import pre_capture_activation_reserve_mb_of

from sglang_shift.models.sizes import MIB
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.tools.plan.hardware import Gpu
from sglang_shift.tools.plan.model import Model

# These are SGLang's defaults for GPUs of 60 to 160 GiB, in MiB. They are from handle_gpu_memory_settings in
# srt/arg_groups/memory_hook.py.
MIN_RESERVE = 10 * 1024
PER_DECODE_GRAPH_REQUEST, PER_PREFILL_GRAPH = 2, 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU's memory.

    Attributes:
        weights: The full-TP shard.
        base: The rest of the base weights. Both modes share the base weights.
        graphs: The graphs of a second mode. SGLang itself does not reserve memory for them.
        reserve: Activations and the graphs of one mode, as SGLang reserves them.
        kv_per_token: K and V of a token.
        total: The whole memory.
        token_shards: D, the GPUs that divide the tokens of a request among them.
    """

    weights: int
    base: int
    graphs: int
    reserve: int
    kv_per_token: int
    total: int
    token_shards: int = 1

    @property
    def pool(self) -> int:
        """What is left for the KV cache. It is negative if the rest does not fit."""
        return self.total - self.weights - self.base - self.graphs - self.reserve

    @property
    def tokens(self) -> int:
        """Number of tokens that the KV cache holds."""
        return max(0, self.pool) // self.kv_per_token * self.token_shards


def memory(
    model: Model,
    gpu: Gpu,
    layout: RankLayout,
    chunk: int,
    kv_dtype: str = "bfloat16",
    *,
    shifts: bool = False,
    token_shards: int = 1,
) -> Memory:
    """Compute what a GPU's memory holds.

    Args:
        model: The model.
        gpu: The GPU.
        layout: The layout of the GPU's replica. S = 1 is TP alone.
        chunk: The most prompt tokens that one step computes.
        kv_dtype: ``bfloat16`` or ``fp8``.
        shifts: Whether both modes run. Each mode then has its own graphs.
        token_shards: D, ``--dcp-size``.
    """
    ranks = layout.world_size
    weights = _weights(model, ranks, 1)
    batch = 256 if ranks < 4 else 512  # the largest decode graph
    prefills = len(generate_prefill_cuda_graph_batch_sizes(chunk))
    graphs = PER_DECODE_GRAPH_REQUEST * batch + PER_PREFILL_GRAPH * prefills
    settings = SimpleNamespace(disaggregation_mode="null", chunked_prefill_size=chunk, tp_size=ranks, pp_size=1)
    # No GPU is passed. SGLang's minimum for a GPU is for the activations alone, and the minimum here is for everything.
    reserve = max(MIN_RESERVE, pre_capture_activation_reserve_mb_of(settings, None) + graphs)
    return Memory(
        weights,
        _weights(model, ranks, layout.sp_size) - weights,
        graphs * MIB if shifts else 0,
        int(reserve * MIB),
        model.sizes.kv_bytes_per_token(ranks, 1 if kv_dtype == "fp8" else 2),
        gpu.memory_mib * MIB,
        token_shards,
    )


def _weights(model: Model, ranks: int, sp: int) -> int:
    """Return the bytes of the base weights of S = ``sp``. Embeddings and LM head are never quantized."""
    return model.sizes.weight_bytes(ranks, sp, 2, model.experts)
