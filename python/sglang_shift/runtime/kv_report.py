"""Reports a rank's KV pool for ``/server_info``."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_parallel


def kv_report(runner: Any) -> dict[str, int]:
    """Return the size of the KV pool.

    Args:
        runner: SGLang's model runner of this rank.

    Returns:
        ``kv_shards``, the ranks that divide the tokens of a request (D); ``kv_tokens``, the tokens that the pools of
        these ranks hold together; and ``kv_bytes``, the bytes of this rank's pool.
    """
    sizes = runner.token_to_kv_pool.get_kv_size_bytes()  # of keys and of values, or of latents
    return {
        "kv_shards": get_parallel().attn_dcp_size,
        "kv_tokens": runner.effective_logical_max_total_num_tokens,
        "kv_bytes": int(sum(sizes) if isinstance(sizes, tuple) else sizes),
    }
