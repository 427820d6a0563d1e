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

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.distributed.parallel_state import get_dcp_group_no_assert
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from sglang_shift.models import token_shards
from sglang_shift.models.heads import Heads
from sglang_shift.platforms.attention import Part, add_sinks, attend, merge, merge_all
from sglang_shift.platforms.attention_backend import CpuAttentionBackend, Extension, Together, grouped, no_lse, take
from sglang_shift.platforms.cpu import ATTENTION, is_active
from sglang_shift.platforms.kv_move import Move, MoveRule
from sglang_shift.seams import put_in_place, relies_on, replaces


class Group(Protocol):
    """The parts of SGLang's ``GroupCoordinator`` that move queries and keys."""

    world_size: int
    rank_in_group: int

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None: ...

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None: ...


class TokenShards:
    """D ranks that divide the tokens of each request, and what moves between them.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.count, self.rank = group, group.world_size, group.rank_in_group

    def owned(self, slots: torch.Tensor) -> torch.Tensor:
        """Whether this rank stores the tokens of ``slots``, as bool."""
        return slots % self.count == self.rank

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Where tokens are in the pool of the rank that stores them."""
        return slots // self.count

    def lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """How many tokens of sequences of ``lengths`` tokens this rank stores."""
        return (lengths + self.count - 1 - self.rank) // self.count

    def all_queries(self, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Get the queries of all ranks. All ranks call it.

        Args:
            query: ``[tokens, heads, width]``, for this rank's heads.
            kv_heads: The KV heads of each rank.

        Returns:
            ``[tokens, D * heads, width]``. Heads that share keys are neighbours, as attention wants them.
        """
        tokens, heads, width = query.shape
        gathered = query.new_empty(self.count, tokens, kv_heads, heads // kv_heads, width)
        self.group.all_gather_into_tensor(gathered.view(self.count * tokens, heads, width), query.contiguous())
        return gathered.permute(1, 2, 0, 3, 4).reshape(tokens, self.count * heads, width)

    def merged(self, part: Part, kv_heads: int) -> Part:
        """Merge what the ranks have computed for this rank's queries. All ranks call it.

        Args:
            part: Attention of the queries of all ranks, as :meth:`all_queries` orders them, to this rank's keys.
            kv_heads: The KV heads of each rank.

        Returns:
            Attention of this rank's queries to the keys of all ranks, ``[tokens, heads, value width]``.
        """
        output, lse = self._by_rank(part.output, kv_heads), self._by_rank(part.lse.unsqueeze(-1), kv_heads)
        sent = torch.cat([as_bytes(output), as_bytes(lse)], -1)
        received = torch.empty_like(sent)
        self.group.all_to_all_single(received, sent)
        output, lse = from_bytes(received, (output, lse))
        return merge_all(Part(output, lse.squeeze(-1)))

    def _by_rank(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """``[tokens, D * heads, width]`` as ``[D, tokens, heads, width]``."""
        tokens, heads, width = x.shape
        by_rank = x.view(tokens, kv_heads, self.count, -1, width).permute(2, 0, 1, 3, 4)
        return by_rank.reshape(self.count, tokens, heads // self.count, width)

    def whole_prefixes(self, stored: Sequence[torch.Tensor], prefixes: Sequence[int]) -> list[list[torch.Tensor]]:
        """Get the keys and values of whole prefixes. All ranks call it.

        Args:
            stored: What this rank stores, prefix by prefix: keys, ``[tokens, KV heads, width]``, and values likewise,
                or keys alone.
            prefixes: The tokens of each prefix.

        Returns:
            The same of each prefix, in the order of its tokens.
        """
        own = self.lengths(torch.tensor(prefixes)).tolist()
        most = [-(-prefix // self.count) for prefix in prefixes]  # the shards of the first rank are the longest
        sent = torch.cat([as_bytes(each) for each in stored], -1)
        if own != most:
            padded = sent.new_zeros(sum(most), *sent.shape[1:])
            for target, shard in zip(padded.split(most), sent.split(own), strict=True):
                target[: shard.shape[0]] = shard
            sent = padded
        received = sent.new_empty(self.count, *sent.shape)
        self.group.all_gather_into_tensor(received.flatten(0, 1), sent.contiguous())
        whole = []
        for prefix, shards in zip(prefixes, received.split(most, 1), strict=True):
            whole.append(from_bytes(shards.transpose(0, 1).flatten(0, 1)[:prefix], stored))
        return whole


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x``. Its last dimension becomes as many times longer as an element has bytes."""
    return x.contiguous().view(torch.uint8)


def from_bytes(x: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors whose bytes :func:`as_bytes` gave, side by side. ``like`` has their dtypes and last dimensions."""
    parts = x.split([each.shape[-1] * each.element_size() for each in like], -1)
    # A copy, and no view of a single row: its first byte need not be where an element may begin.
    copies = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return [copy.view(each.dtype) for copy, each in zip(copies, like, strict=True)]


@relies_on(
    "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc_extend",
    "The first slot of a page of D is a multiple of D. So a token's slot names its owner, as its position does.",
)
class TokenShardedBackend(CpuAttentionBackend):
    """Attention over a KV cache that ``shards`` divide by token.

    Args:
        model_runner: SGLang's model runner.
        shards: The ranks that hold the same KV heads as this rank.
    """

    def __init__(self, model_runner: Any, shards: TokenShards) -> None:
        super().__init__(model_runner)
        self.shards = shards
        self.moves: Counter[Move] = Counter()  # over all layers and steps

    def extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Part:
        refuse_layer(layer, k, v, save_kv_cache)
        query, k, sinks = self._prepare(q, k, v, layer, batch, save_kv_cache, **kwargs)
        extensions = self._extensions(batch)
        if any(extension.visible is not None for extension in extensions):
            raise NotImplementedError(f"drafts cannot be verified with --dcp-size {self.shards.count}; leave one out")
        part = self._chunks(query, k, v, extensions, layer, self._is_causal(layer, batch))
        by_move: dict[Move, list[int]] = {Move.QUERIES: [], Move.KEYS: []}
        rule = self._rule(query, layer)
        for index, extension in enumerate(extensions):
            if (move := rule.choose(extension.new, extension.prefix)) is not Move.NOTHING:
                by_move[move].append(index)
                self.moves[move] += 1
        rows = rows_of(extensions)
        if chosen := by_move[Move.QUERIES]:
            self._move_queries(part, query, [(index, extensions[index], rows[index]) for index in chosen], layer)
        if chosen := by_move[Move.KEYS]:
            self._move_keys(part, query, [(index, extensions[index], rows[index]) for index in chosen], layer)
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

    def _rule(self, query: torch.Tensor, layer: Any) -> MoveRule:
        """The rule for this layer: what a token's queries and its key take."""
        widths = layer.qk_head_dim + layer.v_head_dim
        query_bytes = layer.tp_q_head_num * (widths * query.element_size() + no_lse(query[:0]).element_size())
        stored, keys = layer.qk_head_dim if self._has_latents(layer) else widths, self._buffers(layer)[0]
        return MoveRule(self.shards.count, query_bytes, layer.tp_k_head_num * stored * keys.element_size())

    def _move_queries(
        self, part: Part, query: torch.Tensor, requests: list[tuple[int, Extension, slice]], layer: Any
    ) -> None:
        """Add attention to prefixes whose queries go to the ranks that store them."""
        kv_heads = layer.tp_k_head_num
        queries = self.shards.all_queries(torch.cat([query[rows] for _, _, rows in requests]), kv_heads)
        parts, start = [], 0
        for index, extension, _ in requests:
            of_request = queries[start : start + extension.new]
            parts.append(attend_in(layer, of_request, *self._stored(index, extension, layer)))
            start += extension.new
        stored = Part(torch.cat([each.output for each in parts]), torch.cat([each.lse for each in parts]))
        merged = self.shards.merged(stored, kv_heads)
        start = 0
        for _, extension, rows in requests:
            prefix = Part(*(each[start : start + extension.new] for each in merged))
            part.output[rows], part.lse[rows] = merge(prefix, Part(part.output[rows], part.lse[rows]))
            start += extension.new

    def _move_keys(
        self, part: Part, query: torch.Tensor, requests: list[tuple[int, Extension, slice]], layer: Any
    ) -> None:
        """Add attention to prefixes that come to the queries."""
        stored = zip(*(self._stored(index, extension, layer) for index, extension, _ in requests), strict=True)
        lengths = [extension.prefix for _, extension, _ in requests]
        prefixes = self.shards.whole_prefixes([torch.cat(each) for each in stored], lengths)
        for (_, _, rows), keys_and_values in zip(requests, prefixes, strict=True):
            prefix = attend_in(layer, query[rows], *keys_and_values)
            part.output[rows], part.lse[rows] = merge(prefix, Part(part.output[rows], part.lse[rows]))

    def _stored(self, index: int, extension: Extension, layer: Any) -> list[torch.Tensor]:
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


def rows_of(extensions: list[Extension]) -> list[slice]:
    """The rows of each request's new tokens."""
    rows, start = [], 0
    for extension in extensions:
        rows.append(slice(start, start + extension.new))
        start += extension.new
    return rows


def refuse_layer(layer: Any, k: Any, v: Any, save_kv_cache: bool) -> None:
    """Refuse a layer whose KV cache cannot be divided by token.

    Raises:
        NotImplementedError: it cannot; the message has the reason.
    """
    reason = ""
    if layer.is_cross_attention:
        reason = "reads the keys of an encoder"
    elif layer.sliding_window_size is not None and layer.sliding_window_size >= 0:
        reason = "has a sliding window"
    elif k is None or v is None or not save_kv_cache:
        reason = "writes no keys of its own"
    if reason:
        raise NotImplementedError(f"attention layer {layer.layer_id} {reason}; serve this model without --dcp-size")


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
