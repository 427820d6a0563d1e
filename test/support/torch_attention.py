"""Plain attention in PyTorch in the place of FlashAttention 3, request by request, for machines without a GPU."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from sglang_shift.platforms.attention import Part
from sglang_shift.platforms.fa3 import Spans


class TorchKernels:
    """Attention in float32. Without keys, it gives what no caller may use."""

    def attend_rows(self, query, key, value, queries, keys, *, scale, cap, causal):
        parts = []
        for rows, own in zip(spans(queries), spans(keys), strict=True):
            parts.append(attention(query[rows], key[own], value[own], scale, cap, causal))
        return joined(query, parts)

    def attend_pages(self, query, keys, values, queries, pages, *, scale, cap):
        assert pages.table.dtype == pages.lengths.dtype == torch.int32
        parts = []
        for rows, table, length in zip(spans(queries), pages.table, pages.lengths.tolist(), strict=True):
            own = table[: -(-length // keys.shape[1])].long()
            key, value = (x[own].flatten(0, 1)[:length] for x in (keys, values))
            parts.append(attention(query[rows], key, value, scale, cap, False))
        return joined(query, parts)


def spans(rows: Spans) -> list[slice]:
    starts = rows.starts.tolist()
    assert rows.starts.dtype == torch.int32 and starts[0] == 0
    assert max(rows.starts.diff().tolist()) <= rows.most
    return [slice(*each) for each in pairwise(starts)]


def attention(query, key, value, scale, cap, causal):
    """Attention of the rows of one request, head by head."""
    output = query.new_full((*query.shape[:2], value.shape[2]), math.nan)
    lse = torch.full(query.shape[:2], math.inf, device=query.device)
    if not key.shape[0]:
        return output, lse
    group = query.shape[1] // key.shape[1]
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head // group].float().T * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        if causal:  # the last query sees the last key
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(key.shape[0] - query.shape[0] + 1)
            scores = scores.masked_fill(hidden, -math.inf)
        lse[:, head] = scores.exp().sum(-1).log()
        output[:, head] = (scores.softmax(-1) @ value[:, head // group].float()).to(query.dtype)
    return output, lse


def joined(query, parts):
    output, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    assert output.shape[0] == query.shape[0], "every row belongs to a request"
    return Part(output, lse)
