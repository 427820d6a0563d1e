"""Requests whose KV cache D ranks divide by token: tokens, slots, pools of a layer, and what is expected."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang_shift.platforms.attention import add_sinks, attend

HEADS, WIDTH, VALUE_WIDTH, SLOTS, SCALE = 8, 16, 8, 2048, 0.3
# (prefixes, new tokens) of each step, request by request. The first step has the prefixes of the radix cache written.
STEPS = [
    ([0, 0, 0, 0], [1, 2, 65, 130]),
    ([1, 2, 65, 130], [1, 1, 1, 1]),  # a decode: one rank has no token of the first request before it
    ([2, 3, 66, 131], [1, 1, 1, 40]),  # a chunk beside decodes: queries of three, and the keys of one
    ([3, 4, 67, 171], [70, 90, 3, 1]),
    ([73, 94, 70, 172], [1, 1, 1, 1]),
]


class Pool:
    """A rank's pool of one layer. Rows that were not written are not numbers."""

    def __init__(self, rows, kv_heads, dtype):
        self.keys = torch.full((rows, kv_heads, WIDTH), torch.nan).to(dtype)
        self.values = torch.full((rows, kv_heads, VALUE_WIDTH), torch.nan).to(dtype)

    def get_key_buffer(self, layer_id):
        return self.keys

    def get_value_buffer(self, layer_id):
        return self.values

    def set_kv_buffer(self, layer, places, k, v):
        self.keys[places.loc], self.values[places.loc] = k.to(self.keys.dtype), v.to(self.values.dtype)


class LatentPool(Pool):
    """MLA's pool: the values are the first columns of the keys."""

    def __init__(self, rows, kv_heads, dtype):
        super().__init__(rows, kv_heads, dtype)
        self.values = self.keys[..., :VALUE_WIDTH]

    def set_kv_buffer(self, layer, places, k, v):
        self.keys[places.loc] = k.to(self.keys.dtype)


class Requests:
    """Four requests with their tokens, equal on all ranks, and their slots in pages of D, or of several times D."""

    def __init__(self, kv_heads, shards, shared=0, latents=False, page_size=1):
        generator = torch.Generator().manual_seed(3)
        self.q = torch.randn(4, 200, HEADS, WIDTH, generator=generator)
        self.k = torch.randn(4, 200, kv_heads, WIDTH, generator=generator)
        self.v = torch.randn(4, 200, kv_heads, VALUE_WIDTH, generator=generator)
        if latents:
            self.v = self.k[..., :VALUE_WIDTH]
        size = shards * page_size
        pages = torch.randperm(SLOTS // size - 1, generator=generator) + 1
        pages = pages[: 4 * (200 // size + 1)].view(4, -1)
        self.table = (pages.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
        if shared:  # the third and the last request have the same prefix, in the same slots
            assert shared % size == 0
            self.table[3, :shared] = self.table[2, :shared]
            self.k[3, :shared], self.v[3, :shared] = self.k[2, :shared], self.v[2, :shared]

    def batch(self, prefixes, news, mode, padding=0):
        spans = [slice(p, p + n) for p, n in zip(prefixes, news, strict=True)]
        slots = torch.cat([self.table[i, span] for i, span in enumerate(spans)])
        lengths = torch.tensor(prefixes) + torch.tensor(news)
        batch = SimpleNamespace(
            forward_mode=mode, req_pool_indices=torch.arange(4), seq_lens=lengths,
            out_cache_loc=torch.cat([slots, slots.new_zeros(padding)]), encoder_lens=None, spec_info=None,
            extend_prefix_lens=torch.tensor(prefixes), extend_seq_lens=torch.tensor(news),
            extend_prefix_lens_cpu=prefixes, extend_seq_lens_cpu=news, seq_lens_cpu=lengths, batch_size=4,
        )  # fmt: skip
        rows = [torch.cat([x[i, span] for i, span in enumerate(spans)]) for x in (self.q, self.k, self.v)]
        return batch, [torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in rows]

    def expected(self, prefixes, news, heads, kv_head, sinks, cap):
        outputs = []
        for i, (prefix, new) in enumerate(zip(prefixes, news, strict=True)):
            end = prefix + new
            key, value = (x[i, :end, kv_head : kv_head + 1] for x in (self.k, self.v))
            part = attend(self.q[i, prefix:end, heads], key, value, scale=SCALE, cap=cap)
            outputs.append(add_sinks(part, sinks[heads]).output if sinks is not None else part.output)
        return torch.cat(outputs)


def layer_of(heads, **others):
    return RadixAttention(heads, WIDTH, SCALE, 1, layer_id=0, v_head_dim=VALUE_WIDTH, **others)
