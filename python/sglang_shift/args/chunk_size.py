"""Choose a prefill chunk that gives each rank of an SP step enough tokens."""

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

from sglang_shift.args.sp_size import pool_of, rank_memory_bytes, uses_shift_cpu_platform, weight_bytes

# With at least this many rows, arithmetic limits a bfloat16 GEMM. With fewer rows, reading the weights limits it.
# A data-centre GPU does 200 to 400 operations in the time in which it reads one byte. This is the next power of two.
# It is a rule of thumb, not a measurement.
CHUNK_ROWS_PER_RANK = 512
# A larger chunk holds up the requests that decode meanwhile. SGLang has this default for its largest GPUs.
CHUNK_MAX = 16384


@dataclass(frozen=True)
class Adjustment:
    """A change of SGLang's settings for SP, with its reason.

    Attributes:
        reason: One sentence for the log.
        fields: The values to declare in SGLang's resolution; empty if nothing changes.
    """

    reason: str
    fields: dict[str, Any] = field(default_factory=dict)


def adjust_chunk_size(server_args: Any, sp_size: int) -> Adjustment:
    """Raise the prefill chunk until 1/S of it is enough work for a rank, unless the user gave a chunk.

    The function never lowers SGLang's default for the GPU. The new chunk is :data:`CHUNK_ROWS_PER_RANK` tokens
    times S. Three numbers of tokens limit it: :data:`CHUNK_MAX`, ``--max-prefill-tokens``, and the KV pool of
    ``--max-total-tokens``. The model's context does not, because a chunk holds tokens of several requests.

    SGLang has computed ``mem_fraction_static`` for the default chunk. A larger chunk lowers the fraction, because
    SGLang reserves memory for the activations of the additional tokens. If the user gave a fraction, fraction and
    chunk stay. On a CPU nothing changes, because attention and GEMMs are never that fast there.

    Args:
        server_args: The server arguments, after SGLang has resolved its defaults.
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
    weights = weight_bytes(settings, model_config, [sp_size])[sp_size]
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
    """Why the chunk must stay, or None if it may change."""
    reasons = (
        (server_args.chunked_prefill_size is not None, "as given"),
        ((settings.chunked_prefill_size or -1) < 1, "because SGLang does not chunk prefills here"),
        (uses_shift_cpu_platform(), "SGLang's default for a CPU"),
        (
            # With post-capture sizing, SGLang has reserved nothing for steps larger than its graphs.
            server_args.mem_fraction_static is not None or post_capture_kv_sizing_planned(server_args),
            "SGLang's default, because the memory for activations is fixed",
        ),
        (not get_device_memory_capacity(settings.device), "because the memory of this device is not known"),
    )
    return next((why for applies, why in reasons if applies), None)


def chunk_size(default: int, sp_size: int, max_prefill_tokens: int, max_total_tokens: int | None) -> int:
    """The size of a chunk that suits S: ``default`` or more, within the bounds. All sizes are in tokens."""
    bounds = (CHUNK_ROWS_PER_RANK * sp_size, CHUNK_MAX, max_prefill_tokens, max_total_tokens)
    return max(default, min(bound for bound in bounds if bound is not None))


def fraction_for_chunk(settings: Any, chunk: int, capacity: float) -> float:
    """Compute ``mem_fraction_static`` with the memory that SGLang reserves for the activations of a larger chunk.

    Args:
        settings: A view of the resolved server arguments.
        chunk: The tokens of the larger chunk.
        capacity: The memory of the device in MiB.
    """
    names = ("disaggregation_mode", "max_prefill_tokens", "tp_size", "pp_size")
    larger_settings = SimpleNamespace(chunked_prefill_size=chunk, **{name: getattr(settings, name) for name in names})
    larger_reserve = pre_capture_activation_reserve_mb_of(larger_settings, capacity)
    reserve = pre_capture_activation_reserve_mb_of(settings, capacity)
    return round(settings.mem_fraction_static - (larger_reserve - reserve) / capacity, 3)
