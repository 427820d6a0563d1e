"""FlashAttention 3 with its log-sum-exp, for GPUs: the only kernels of :mod:`sglang_shift.platforms.fa3_shards`.

Rows of several requests are one after the other, and keys are in the same way, or in pages of a KV pool.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from sglang.kernels.ops.attention.flash_attention import flash_attn_varlen_func, flash_attn_with_kvcache

from sglang_shift.platforms.attention import Part
from sglang_shift.seams import relies_on


class Spans(NamedTuple):
    """How many rows each request has, one request after the other.

    Attributes:
        starts: ``[requests + 1]``, int32: the first row of each request, and the number of all rows.
        most: At least the rows of each request.
    """

    starts: torch.Tensor
    most: int

    @classmethod
    def of(cls, counts: list[int], device: torch.device | str) -> Spans:
        """The spans of requests with ``counts`` rows."""
        starts = torch.tensor([0, *counts]).cumsum(0)
        return cls(starts.to(device=device, dtype=torch.int32), max(counts, default=0))


class Pages(NamedTuple):
    """Where the keys of each request are in a KV pool.

    Attributes:
        table: ``[requests, pages]``, int32: the pages of each request. Pages after its last are anything.
        lengths: ``[requests]``, int32: the keys of each request. It may have none.
    """

    table: torch.Tensor
    lengths: torch.Tensor


class Kernels(Protocol):
    """What attention over a KV cache that is divided by token needs of a GPU.

    Queries are ``[rows, heads, width]``. Heads that share keys are neighbours. Every row belongs to a request. The
    output is ``[rows, heads, value width]``, and the log-sum-exp ``[rows, heads]`` is natural.
    """

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        queries: Spans,
        keys: Spans,
        *,
        scale: float,
        cap: float,
        causal: bool,
    ) -> Part:
        """Attention of each request's queries to its keys, ``[rows, KV heads, width]``. Each request has keys."""

    def attend_pages(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: Spans,
        pages: Pages,
        *,
        scale: float,
        cap: float,
    ) -> Part:
        """Attention of each request's queries to all its keys in ``keys``, ``[pages, page size, KV heads, width]``.

        What the rows of a request without keys get may be anything.
        """  # fmt: skip


class FlashAttention3:
    """SGLang's FlashAttention 3."""

    @relies_on(
        "sglang.kernels.ops.attention.flash_attention:flash_attn_varlen_func",
        "It gives the log-sum-exp as [heads, rows], after the output.",
    )
    def attend_rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: Spans, keys: Spans, *,
        scale: float, cap: float, causal: bool,
    ) -> Part:  # fmt: skip
        return call(
            flash_attn_varlen_func,
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=queries.starts,
            cu_seqlens_k=keys.starts,
            max_seqlen_q=queries.most,
            max_seqlen_k=keys.most,
            scale=scale,
            cap=cap,
            causal=causal,
        )

    @relies_on(
        "sglang.kernels.ops.attention.flash_attention:flash_attn_with_kvcache",
        "It gives the log-sum-exp as [heads, rows], after the output.",
    )
    def attend_pages(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, queries: Spans, pages: Pages, *,
        scale: float, cap: float,
    ) -> Part:  # fmt: skip
        return call(
            flash_attn_with_kvcache,
            q=query,
            k_cache=keys,
            v_cache=values,
            page_table=pages.table,
            cache_seqlens=pages.lengths,
            cu_seqlens_q=queries.starts,
            max_seqlen_q=queries.most,
            scale=scale,
            cap=cap,
            causal=False,
        )


def call(kernel: Callable[..., Any], *, scale: float, cap: float, causal: bool, **operands: Any) -> Part:
    """Call one of SGLang's functions of FlashAttention 3."""
    options = {"softmax_scale": scale, "softcap": cap, "causal": causal}
    output, lse, *_ = kernel(**operands, **options, return_softmax_lse=True, ver=3)
    return Part(output, lse.T)


def attend_stored(
    kernels: Kernels, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, queries: Spans, pages: Pages, *,
    scale: float, cap: float,
) -> Part:  # fmt: skip
    """Attention to the keys in pages. Rows of a request without keys get the output 0 and the log-sum-exp -inf.

    Kernels differ in what they give these rows: FlashAttention 2 gives +inf. A graph can record this function.
    """
    part = kernels.attend_pages(query, keys, values, queries, pages, scale=scale, cap=cap)
    nothing = pages.lengths == 0
    if queries.most > 1:
        counts = queries.starts.diff()
        nothing = nothing.repeat_interleave(counts, output_size=query.shape[0])
    nothing = nothing.unsqueeze(1)
    return Part(part.output.masked_fill(nothing.unsqueeze(2), 0), part.lse.masked_fill(nothing, -math.inf))
