"""Attention over a KV cache that ranks divide by token: SGLang's decode context parallelism (DCP) on the CPU platform.

Ranks that hold the same KV heads form groups of D neighbours. The token at position i of a request is stored on the
rank ``i % D`` of each group, so a KV pool of N tokens on each rank holds D * N tokens. SGLang's allocator counts slots
in the whole group: slot x is row ``x // D`` of rank ``x % D``.

MLA's latents are divided in the same way. They are one key for all heads, and all ranks hold them, so D may be P. The
values are the first columns of the keys, and never move on their own.

A step computes attention in two parts, which are merged by their log-sum-exp. All ranks of a group have the keys of the
new tokens, so a chunk's attention to itself is local. For the prefix, queries and keys must meet:
:mod:`sglang_shift.platforms.kv_move` says which of them move. A step moves the queries of all its requests at once, and
the prefixes of all others at once. A decode always moves its queries.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.distributed.parallel_state import get_dcp_group_no_assert
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_shift.models import token_shards
from sglang_shift.models.heads import Heads
from sglang_shift.platforms.attention import Part, add_sinks, attend
from sglang_shift.platforms.attention_backend import CpuAttentionBackend, Extension, Together, grouped, no_lse, take
from sglang_shift.platforms.cpu import ATTENTION, is_active
from sglang_shift.platforms.kv_move import Move
from sglang_shift.platforms.shards import DividedPrefixes, Moving, TokenShards, refuse_layer, rows_of
from sglang_shift.seams import extends, put_in_place, relies_on, replaces


@extends("sglang.srt.layers.attention.base_attn_backend:AttentionBackend", "attention over parts of requests on a CPU")
class TokenShardedBackend(DividedPrefixes, CpuAttentionBackend):
    """Attention over a KV cache that ``shards`` divide by token.

    Args:
        model_runner: SGLang's model runner.
        shards: The ranks that hold the same KV heads as this rank.
    """

    def __init__(self, model_runner: Any, shards: TokenShards) -> None:
        CpuAttentionBackend.__init__(self, model_runner)
        DividedPrefixes.__init__(self, shards)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Forget the step before."""
        super().init_forward_metadata(forward_batch)
        self.common = {}

    def extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Part:
        refuse_layer(layer, k, v, save_kv_cache)
        query, k, sinks = self._prepare(q, k, v, layer, batch, save_kv_cache, **kwargs)
        extensions = self._extensions(batch)
        if any(extension.visible is not None for extension in extensions):
            raise NotImplementedError(f"drafts cannot be verified with --dcp-size {self.shards.count}; leave one out")
        part = self._chunks(query, k, v, extensions, layer, self._is_causal(layer, batch))
        self.add_prefixes(part, query, extensions, layer)
        return part if sinks is None else add_sinks(part, sinks)

    def decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Part:
        refuse_layer(layer, k, v, save_kv_cache)
        query, _, sinks = self._prepare(q, k, v, layer, batch, save_kv_cache, **kwargs)
        kv_heads = layer.tp_k_head_num
        queries = self.shards.all_queries(query, kv_heads)
        part = self.shards.merged(self._attend_together(queries, self._together(layer, batch), layer), kv_heads)
        self.moves[Move.QUERIES] += query.shape[0]
        return part if sinks is None else add_sinks(part, sinks)

    def _write(self, k: torch.Tensor, v: torch.Tensor, layer: Any, batch: Any) -> None:
        slots = batch.out_cache_loc
        own = self.shards.owned(slots)
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(self.shards.rows(slots[own])), k[own], v[own])

    def _chunks(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extensions: list[Extension],
        layer: Any,
        causal: bool,
    ) -> Part:
        """Attention of each request's new tokens to themselves. Rows that only fill up the batch are 0."""
        new = [k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)]
        if not self._has_latents(layer):
            new.append(v.view(-1, layer.tp_v_head_num, layer.v_head_dim))
        part = Part(query.new_zeros(*query.shape[:2], layer.v_head_dim), no_lse(query))
        for rows in rows_of(extensions):
            part.output[rows], part.lse[rows] = attend_in(layer, query[rows], *(x[rows] for x in new), causal=causal)
        return part

    def _key_bytes(self, layer: Any) -> int:
        keys, latents = self._buffers(layer)[0], self._has_latents(layer)
        width = layer.qk_head_dim if latents else layer.qk_head_dim + layer.v_head_dim
        return int(layer.tp_k_head_num * width * keys.element_size())

    def _attend_to_shards(self, queries: torch.Tensor, moving: Moving, layer: Any) -> Part:
        stored = [self._stored_of(index, extension, layer) for index, extension in moving.members]
        return attend_each(layer, queries, moving, stored)

    def _stored(self, moving: Moving, layer: Any) -> list[torch.Tensor]:
        stored = [self._stored_of(index, extension, layer) for index, extension in moving.members]
        return [torch.cat(each) for each in zip(*stored, strict=True)]

    def _attend_to_prefixes(
        self, query: torch.Tensor, prefixes: list[list[torch.Tensor]], moving: Moving, layer: Any
    ) -> Part:
        return attend_each(layer, query, moving, prefixes)

    def _stored_of(self, index: int, extension: Extension, layer: Any) -> list[torch.Tensor]:
        """Keys and values of the part of a prefix that this rank stores, or latents, in the dtype of the pool."""
        if index not in self.slots:
            slots = self.req_to_token_pool.req_to_token[extension.row, self.shards.rank : extension.prefix]
            self.slots[index] = self.shards.rows(slots[:: self.shards.count])
        buffers = self._buffers(layer)
        return [take(each, self.slots[index]) for each in (buffers[:1] if self._has_latents(layer) else buffers)]

    def _together(self, layer: Any, batch: Any) -> list[Together]:
        """The requests of a decode of which this rank stores tokens, in groups of similar lengths."""
        if "decode" not in self.slots:
            table, rows = self.req_to_token_pool.req_to_token, batch.req_pool_indices

            def slots_at(member: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                positions = key * self.shards.count + self.shards.rank
                return self.shards.rows(table[rows[member].unsqueeze(1), positions])

            self.slots["decode"] = grouped(self.shards.lengths(batch.seq_lens.long()), slots_at)
        return self.slots["decode"]


def attend_in(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None, *, causal: bool = False
) -> Part:
    """Attention with a layer's scale and cap. A prefix needs no order: every new token attends to all of it.

    Without values, the keys are latents.
    """
    key = key.to(query.dtype)
    value = key[..., : layer.v_head_dim] if value is None else value.to(query.dtype)
    return attend(query, key, value, scale=layer.scaling, causal=causal, cap=layer.logit_cap)


def attend_each(layer: Any, query: torch.Tensor, moving: Moving, keys: list[list[torch.Tensor]]) -> Part:
    """Attention of the new tokens of each request to its keys, which are ``keys`` with their values, or latents."""
    news = [extension.new for _, extension in moving.members]
    parts = [attend_in(layer, rows, *each) for rows, each in zip(query.split(news), keys, strict=True)]
    return Part(torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts]))


@replaces(
    "sglang.srt.distributed.parallel_state:is_cuda",
    "SGLang builds the groups of DCP only on devices whose backends it knows. It asks this function for nothing else.",
    when=is_active,
)
@relies_on(
    "sglang.srt.distributed.parallel_state:initialize_model_parallel",
    "This function builds the groups, of D neighbours each, and asks is_cuda whether it may.",
)
def has_token_shards() -> bool:
    """Whether the device has attention over token shards, in place of ``is_cuda`` in ``parallel_state``."""
    return True


def make_backend(model_runner: Any) -> CpuAttentionBackend:
    """Return the attention backend of a rank: for D ranks that divide tokens, if SGLang has built their group.

    Raises:
        Refused: the ranks of a group do not hold the same KV heads. The arguments of a stock server are not checked.
    """
    group = get_dcp_group_no_assert()
    if group is None:
        return CpuAttentionBackend(model_runner)
    config, ranks = model_runner.model_config, get_parallel().attn_tp_size
    if config.attention_arch == AttentionArch.MLA:
        token_shards.check_latent_shards(ranks, group.world_size)
        take_over_latents(model_runner.model, model_runner.token_to_kv_pool)
    else:
        heads = Heads(config.num_attention_heads, config.get_total_num_kv_heads())
        token_shards.check_token_shards(heads, ranks, group.world_size)
    return TokenShardedBackend(model_runner, TokenShards(group))


@relies_on(
    "sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla:DeepseekMLAForwardMixin.forward_absorb_core",
    "If dcp_size is 1, it calls attention for this rank's heads, and lets attention do the rest.",
)
@relies_on(
    "sglang.srt.model_executor.runner.eager_runner:EagerRunner._execute_extend",
    "It asks the model for what SGLang's own way needs, and passes it on to the layers.",
)
@relies_on(
    "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool.set_kv_buffer",
    "It writes at rows of this rank if write_loc_is_dcp_resolved says so.",
)
def take_over_latents(model: Any, pool: Any) -> None:
    """Let SGLang's MLA layers leave the division of tokens to the backend.

    SGLang's way is in these layers: they move queries and latents with CUDA kernels, for single backends.

    Args:
        model: The model, which is built for D ranks.
        pool: Its KV pool.
    """
    for module in model.modules():
        if getattr(module, "dcp_size", 1) > 1:
            module.dcp_size = 1
    if hasattr(model, "prepare_context_parallel_metadata_for_dcp"):
        model.prepare_context_parallel_metadata_for_dcp = lambda *_: None
    pool.write_loc_is_dcp_resolved = True


def register() -> None:
    """Put the backends into SGLang's registry, and let SGLang build their groups."""
    register_attention_backend(ATTENTION)(make_backend)
    put_in_place(has_token_shards)
