"""Attention on a CPU, with its log-sum-exp, and the merge of two parts of it.

Every function returns a :class:`Part`: the output over some keys, and the log-sum-exp of their scores. :func:`merge`
makes the output over the keys of both parts. So a chunk of a prompt and its cached prefix are computed apart, and no
row of the prefix is computed again. Memory is bounded, because scores exist only for a block of queries and keys.

PyTorch's fused kernel computes a part if it can. It knows no cap of the scores; :func:`_eager` does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import pad

# Queries in one block, if each query has its own window of keys or if the scores are capped.
QUERY_BLOCK = 256
# Keys in one block, if the scores are capped.
KEY_BLOCK = 1024

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Part(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        output: ``[..., value width]`` in the queries' dtype: the mean of the values by the softmax over these keys.
        lse: ``[...]`` in float32 (float64 for float64): the natural logarithm of the sum of the exponentials of the
            scores. It is -inf if there are no keys, and the output is then 0. FlashInfer's logarithms have base 2:
            they are these times ``log2(e)``.
    """

    output: torch.Tensor
    lse: torch.Tensor


def merge(one: Part, other: Part) -> Part:
    """Return attention over the keys of both parts, which have no key in common.

    This is ``merge_state`` of FlashInfer: each output weighs as much as its share of the sum of exponentials.
    """
    share = torch.sigmoid(one.lse - other.lse).nan_to_num().unsqueeze(-1)  # -inf less -inf is not a number
    output = one.output * share + other.output * (1 - share)
    return Part(output.to(one.output.dtype), torch.logaddexp(one.lse, other.lse))


def merge_all(parts: Part) -> Part:
    """Return attention over the keys of several parts, which have no key in common.

    Args:
        parts: The parts, stacked in a first dimension.
    """
    lse = torch.logsumexp(parts.lse, 0)
    shares = torch.exp(parts.lse - lse).nan_to_num().unsqueeze(-1)  # -inf less -inf is not a number
    return Part((parts.output * shares).sum(0).to(parts.output.dtype), lse)


def add_sinks(part: Part, sinks: torch.Tensor) -> Part:
    """Return attention in which each head has one more key: its score is the head's sink, and its value is 0.

    Args:
        part: Attention over all other keys. Heads are the last dimension of ``lse``.
        sinks: ``[heads]``, the scores.
    """
    sinks = sinks.to(part.lse.dtype)
    output = part.output * torch.sigmoid(part.lse - sinks).unsqueeze(-1)
    return Part(output.to(part.output.dtype), torch.logaddexp(part.lse, sinks))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    cap: float = 0.0,
    visible: torch.Tensor | None = None,
) -> Part:
    """Return attention of one request's new tokens to its keys.

    Args:
        query: ``[new tokens, heads, width]``.
        key: ``[keys, KV heads, width]``. The new tokens' own keys come last.
        value: ``[keys, KV heads, value width]``.
        scale: The factor of the scores.
        causal: Whether a token attends to no later token.
        window: If not None, a token attends to itself and to this number of tokens before it, and without ``causal``
            to as many after it. This is SGLang's ``sliding_window_size``, which is one less than ``sliding_window`` of
            transformers.
        cap: If positive, a score ``s`` becomes ``cap * tanh(s / cap)``.
        visible: ``[new tokens, keys]``, bool: which keys a token attends to, in place of ``causal``. A window also
            hides the keys before it. The scores are one block, so this is for few tokens.

    Returns:
        A part with ``output`` ``[new tokens, heads, value width]`` and ``lse`` ``[new tokens, heads]``.
    """
    new, keys = query.shape[0], key.shape[0]
    before = keys - new  # the cached tokens
    # [1, heads, tokens, width], without a copy
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    if window is not None and window >= keys - 1:
        window = None
    if visible is not None:
        if window is not None:
            token = torch.arange(before, keys, device=query.device).unsqueeze(1)
            visible = visible & (torch.arange(keys, device=query.device) >= token - window)
        part = attend_batch(q, k, v, scale=scale, cap=cap, visible=visible)
    elif window is not None:
        part = _attend_window(q, k, v, before, window, scale, cap, causal)
    elif causal and new > 1:
        part = attend_batch(q, k[:, :, before:], v[:, :, before:], scale=scale, cap=cap, causal=True)
        if before:
            prefix = attend_batch(q, k[:, :, :before], v[:, :, :before], scale=scale, cap=cap)
            part = merge(prefix, part)
    else:
        part = attend_batch(q, k, v, scale=scale, cap=cap)
    return Part(part.output[0].transpose(0, 1), part.lse[0].transpose(0, 1))


def band(
    queries: int, keys: int, first: int, window: int, device: torch.device | None = None, *, causal: bool = True
) -> torch.Tensor:
    """Return ``[queries, keys]``, bool: whether a key is visible from a window.

    Args:
        queries: The number of queries.
        keys: The number of keys.
        first: The index of the key of the first query's own token.
        window: The number of visible tokens before a query's own.
        device: The device of the result.
        causal: Whether no token after a query's own is visible. Otherwise ``window`` tokens after it are.
    """
    token = torch.arange(first, first + queries, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    return (key <= (token if causal else token + window)) & (key >= token - window)


def _attend_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, window: int, scale: float, cap: float, causal: bool
) -> Part:
    """Attention of each block of queries to the keys that its windows cover."""
    parts = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        rows = q[:, :, start : start + QUERY_BLOCK]
        count, first = rows.shape[2], before + start  # the key of the first row's own token
        low, high = max(0, first - window), first + count + (0 if causal else window)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        visible = band(count, keys.shape[2], first - low, window, q.device, causal=causal) if count > 1 else None
        parts.append(attend_batch(rows, keys, values, scale=scale, cap=cap, visible=visible))
    return _concatenate(parts, q, v)


def attend_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    cap: float = 0.0,
    visible: torch.Tensor | None = None,
) -> Part:
    """Return attention of several requests, without a copy of keys for the heads that share them.

    Args:
        q: ``[requests, heads, queries, width]``.
        k: ``[requests, KV heads, keys, width]``.
        v: ``[requests, KV heads, keys, value width]``.
        scale: The factor of the scores.
        causal: Whether query i attends to the keys 0 to i only.
        cap: If positive, a score ``s`` becomes ``cap * tanh(s / cap)``.
        visible: Which keys a query attends to, bool, ``[queries, keys]`` or with leading dimensions of ``q``, which
            may be 1. Each query has at least one.

    Returns:
        A part with ``output`` ``[requests, heads, queries, value width]`` and ``lse`` ``[requests, heads, queries]``.
    """
    if 0 in q.shape[:3] or k.shape[2] == 0:
        return _no_keys(q, v)
    if cap > 0:
        return _eager(q, k, v, scale, causal, cap, visible)
    return _fused(q, k, v, scale, causal, visible)


def _no_keys(q: torch.Tensor, v: torch.Tensor) -> Part:
    lse = torch.full(q.shape[:3], -math.inf, dtype=_accumulator(q), device=q.device)
    return Part(q.new_zeros(*q.shape[:3], v.shape[3]), lse)


def _accumulator(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, visible: torch.Tensor | None
) -> Part:
    """PyTorch's kernel. It wants keys and values of the same width, and adds its mask to the scores."""
    width = v.shape[3]
    if width < k.shape[3] and _first_columns(v, k):  # MLA
        v = k
    elif width < k.shape[3]:
        v = pad(v, (0, k.shape[3] - width))
    elif width > k.shape[3]:
        q, k = (pad(x, (0, width - x.shape[3])) for x in (q, k))
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -math.inf)
    output, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return Part(output[..., :width], lse)


def _first_columns(v: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the values are a view of the keys. The strides of dimensions of size 1 do not matter."""
    strides = zip(v.stride(), k.stride(), v.shape, strict=True)
    return v.data_ptr() == k.data_ptr() and all(own == other for own, other, size in strides if size > 1)


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    cap: float,
    visible: torch.Tensor | None,
) -> Part:
    """Block by block with plain operations."""
    if visible is not None:
        visible = visible.expand(q.shape[0], 1, q.shape[2], k.shape[2])
    rows = []
    for start in range(0, q.shape[2], QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, q.shape[2])
        part: Part | None = None
        for low in range(0, min(end, k.shape[2]) if causal else k.shape[2], KEY_BLOCK):
            high = min(low + KEY_BLOCK, end if causal else k.shape[2], k.shape[2])
            seen = None
            if visible is not None:
                seen = visible[:, :, start:end, low:high]
            elif causal and high - 1 > start:
                seen = band(end - start, high - low, start - low, k.shape[2], q.device)
            block = _eager_block(q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], scale, cap, seen)
            part = block if part is None else merge(part, block)
        assert part is not None
        rows.append(part)
    return _concatenate(rows, q, v)


def _eager_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, cap: float, visible: torch.Tensor | None
) -> Part:
    """Heads that share keys are rows of one product, so the keys need no copy."""
    requests, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = q.reshape(requests, kv_heads, -1, width)
    scores = torch.matmul(grouped, k.transpose(2, 3)).to(_accumulator(q)).view(requests, heads, queries, keys)
    scores = torch.tanh(scores.mul_(scale / cap)).mul_(cap)
    if visible is not None:
        scores.masked_fill_(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    shares = scores.sub_(lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)).exp_().to(v.dtype)
    output = torch.matmul(shares.view(requests, kv_heads, -1, keys), v)
    return Part(output.view(requests, heads, queries, -1), lse)


def _concatenate(parts: list[Part], q: torch.Tensor, v: torch.Tensor) -> Part:
    """Parts of consecutive queries as one."""
    if not parts:
        return _no_keys(q, v)
    if len(parts) == 1:
        return parts[0]
    return Part(torch.cat([part.output for part in parts], 2), torch.cat([part.lse for part in parts], 2))
