"""How many tokens a step should have in SP: the prefill chunk, and the sizes of graphs."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang.srt.arg_groups.overrides import (
    model_config_of,
    post_capture_kv_sizing_planned,
    pre_capture_activation_reserve_mb_of,
    resolving_view,
)
from sglang.srt.utils import get_device_memory_capacity

from sglang_shift.args.sp_size import on_our_cpu_platform, pool_of, rank_memory_bytes
from sglang_shift.models.sizes import ModelSizes

# Rows from which on a bfloat16 GEMM is bound by arithmetic, not by reading its weights: data-centre
# GPUs do 200 to 400 operations in the time in which they read a byte; next power of two. A rule of
# thumb, not a measurement.
CHUNK_ROWS_PER_RANK = 512
# Larger chunks hold up the requests that decode meanwhile. SGLang's own default for its largest GPUs.
CHUNK_MAX = 16384


@dataclass(frozen=True)
class Adjustment:
    """What is changed of SGLang's settings for SP, and in words why.

    Attributes:
        reason: One sentence for the log.
        fields: What to declare in SGLang's resolution; empty if all stays as it is.
    """

    reason: str
    fields: dict[str, Any] = field(default_factory=dict)


def adjust_chunk_size(server_args: Any, sp_size: int) -> Adjustment:
    """A prefill chunk of which each rank's 1/S is enough work, where the user gave none.

    SGLang's default for the GPU is only ever raised: to :data:`CHUNK_ROWS_PER_RANK` tokens times S,
    but to no more than :data:`CHUNK_MAX`, than ``--max-prefill-tokens``, or than the KV pool of
    ``--max-total-tokens``. The model's context is no bound: a chunk holds tokens of several requests.
    ``mem_fraction_static`` was computed for the default chunk, so it is lowered by what SGLang
    reserves for the activations of the additional tokens. A fraction that the user gave is kept, and
    the chunk with it. On a CPU, where attention and GEMMs are never that fast, nothing changes.

    Args:
        server_args: Resolved as far as SGLang's defaults.
        sp_size: S.
    """
    settings = resolving_view(server_args)
    default = settings.chunked_prefill_size
    if reason := _reason_to_keep(server_args, settings):
        return Adjustment(f"--chunked-prefill-size stays {default}, {reason}")
    chunk = chunk_size(default, sp_size, settings.max_prefill_tokens, settings.max_total_tokens)
    if chunk == default:
        return Adjustment(
            f"--chunked-prefill-size stays {default}, SGLang's default: {default // sp_size} tokens a rank"
        )
    fraction = fraction_for_chunk(settings, chunk, get_device_memory_capacity(settings.device))
    model_config = model_config_of(server_args)
    memory = int(rank_memory_bytes(settings) * fraction / settings.mem_fraction_static)
    sizes = ModelSizes.of(model_config.hf_config)
    weights = sizes.weight_bytes(settings.tp_size, sp_size, model_config.dtype.itemsize)
    if weights + pool_of(settings, model_config, memory).target > memory:
        return Adjustment(
            f"--chunked-prefill-size stays {default}, SGLang's default: the activations of {chunk} tokens would take "
            "memory that the KV pool needs"
        )
    return Adjustment(
        f"--chunked-prefill-size is {chunk} instead of SGLang's {default}, for {chunk // sp_size} tokens a rank, and "
        f"--mem-fraction-static {fraction} instead of {settings.mem_fraction_static}, for their activations",
        {"chunked_prefill_size": chunk, "mem_fraction_static": fraction},
    )


def _reason_to_keep(server_args: Any, settings: Any) -> str | None:
    """Why the chunk may not be changed, or None."""
    reasons = (
        (server_args.chunked_prefill_size is not None, "as given"),
        ((settings.chunked_prefill_size or -1) < 1, "because SGLang does not chunk prefills here"),
        (on_our_cpu_platform(), "SGLang's default for a CPU"),
        (
            # With post-capture sizing, SGLang has reserved nothing for steps larger than its graphs.
            server_args.mem_fraction_static is not None or post_capture_kv_sizing_planned(server_args),
            "SGLang's default, because the memory for activations is fixed",
        ),
        (not get_device_memory_capacity(settings.device), "because the memory of this device is not known"),
    )
    return next((why for applies, why in reasons if applies), None)


def chunk_size(default: int, sp_size: int, max_prefill_tokens: int, max_total_tokens: int | None) -> int:
    """Tokens of a chunk that suits S: ``default`` or more, within the bounds; all in tokens."""
    bounds = (CHUNK_ROWS_PER_RANK * sp_size, CHUNK_MAX, max_prefill_tokens, max_total_tokens)
    return max(default, min(bound for bound in bounds if bound is not None))


def fraction_for_chunk(settings: Any, chunk: int, capacity: float) -> float:
    """``mem_fraction_static`` with SGLang's activation reserve for a chunk of ``chunk`` tokens.

    Args:
        settings: A view of the resolved server arguments.
        chunk: Tokens.
        capacity: The device's memory in MiB.
    """
    names = ("disaggregation_mode", "max_prefill_tokens", "tp_size", "pp_size")
    larger = SimpleNamespace(chunked_prefill_size=chunk, **{name: getattr(settings, name) for name in names})
    more = pre_capture_activation_reserve_mb_of(larger, capacity)
    return round(
        settings.mem_fraction_static - (more - pre_capture_activation_reserve_mb_of(settings, capacity)) / capacity, 3
    )
