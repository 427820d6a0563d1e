"""Attention over a KV cache that ranks divide by token, on GPUs with FlashAttention 3.

SGLang's own backend of this name writes each token on all ranks. So on D ranks that divide tokens, the name ``fa3``
means our backend. It stores and moves what the backend of the CPU platform does
(:mod:`sglang_shift.platforms.token_shards`), and computes a step with one kernel for the new tokens and one for each
way in which their prefixes move. A decode is one kernel between two collectives, and CUDA graphs can record it.

A page of SGLang's allocator has ``D * page size`` slots. A rank stores every D-th of them, in one page of its pool.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.distributed.parallel_state import get_dcp_group_no_assert
from sglang.srt.layers.attention.attention_registry import (
    create_flashattention_v3_backend,
    register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.layout.paged_view import paged_view
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_shift.errors import Refusal
from sglang_shift.platforms.attention import Part
from sglang_shift.platforms.attention_backend import Extension, no_lse, refuse_unknown
from sglang_shift.platforms.fa3 import FlashAttention3, Kernels, Pages, Spans, attend_stored
from sglang_shift.platforms.kv_move import Move
from sglang_shift.platforms.shards import DividedPrefixes, Moving, TokenShards, refuse_layer
from sglang_shift.seams import extends, relies_on

NAME = "fa3"
LACKS = "which --attention-backend fa3 does not have with --dcp-size; leave --dcp-size out"

OTHER_DTYPE = Refusal(
    "the KV cache has {stored} and the model {computed}, which --dcp-size {D} does not serve with --attention-backend "
    "fa3; give --kv-cache-dtype bfloat16 or --attention-backend triton",
    "FlashAttention 3 then wants queries in 8 bits, too. A checkpoint may name such a cache.",
)


OTHER_LAYOUT = Refusal(
    "SGLANG_USE_HND_KVCACHE is not served with --dcp-size {D} and --attention-backend fa3; leave it out",
    "A rank takes single tokens out of its pool, and their heads are then not side by side.",
)


class Decode(NamedTuple):
    """The rows and keys of a decode."""

    queries: Spans
    pages: Pages


@extends(
    "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "attention over parts of requests with FlashAttention 3",
)
@relies_on(
    "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.clear",
    "No request gets the first page. So a rank writes there what other ranks store.",
)
@relies_on(
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.capture_one_shape",
    "It calls init_forward_metadata_in_graph inside of the capture, with the batch that the model gets.",
)
@relies_on(
    "sglang.srt.models.utils:enable_fused_set_kv_buffer",
    "With a dcp_kv_mask, models leave it to the backend to write keys.",
)
class Fa3ShardedBackend(DividedPrefixes, AttentionBackend):
    """Attention over a KV cache that ``shards`` divide by token.

    Args:
        model_runner: SGLang's model runner.
        shards: The ranks that hold the same KV heads as this rank.
        kernels: Those of FlashAttention 3.

    Attributes:
        places: Where this rank writes the new tokens of a step: those of other ranks go to the first row.
    """

    def __init__(self, model_runner: Any, shards: TokenShards, kernels: Kernels) -> None:
        super().__init__(shards)
        self.kernels = kernels
        self.device = model_runner.device
        self.table = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.page_size = model_runner.page_size
        self.stride = shards.count * self.page_size  # the slots of a page of the allocator
        self.places: torch.Tensor | None = None
        self.decode: Decode | None = None
        self.graphs: Decode | None = None  # what all graphs read

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepare a step that runs without a graph. What the layers of an extend share is made by the first layer."""
        self.common = {}
        self.decode = None
        if forward_batch.forward_mode.is_decode_or_idle():
            requests = forward_batch.seq_lens.shape[0]
            queries = Spans(torch.arange(requests + 1, dtype=torch.int32, device=self.device), 1)
            self.decode = Decode(queries, self._pages_of_decode(forward_batch, requests))
        self.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what all graphs read. A step fills it before its graph is replayed."""
        pages = -(-self.table.shape[1] // self.stride)
        self.graphs = Decode(
            Spans(torch.arange(max_bs + 1, dtype=torch.int32, device=self.device), 1),
            Pages(
                torch.zeros(max_bs, pages, dtype=torch.int32, device=self.device),
                torch.zeros(max_bs, dtype=torch.int32, device=self.device),
            ),
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Prepare the capture or the replay of a decode."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            raise NotImplementedError(f"graphs of {forward_batch.forward_mode.name} cannot be captured with --dcp-size")
        assert self.graphs is not None
        requests = forward_batch.batch_size
        table, lengths = self._pages_of_decode(forward_batch, requests)
        queries, pages = self.graphs
        pages.table[:requests, : table.shape[1]].copy_(table)
        pages.lengths[:requests].copy_(lengths)
        starts = queries.starts[: requests + 1]
        self.decode = Decode(Spans(starts, 1), Pages(pages.table[:requests], pages.lengths[:requests]))

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Say where this rank writes the step's new tokens. A graph records this, and reads the slots of its step."""
        slots = forward_batch.out_cache_loc
        if slots is not None:
            own = self.shards.owned(slots)
            self.places = torch.where(own, self.shards.rows(slots), 0)
            forward_batch.dcp_kv_mask = own

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of requests that only fill up a graph."""
        return 1

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **others: Any
    ) -> torch.Tensor:
        """Attention of prompts, and of chunks of prompts."""
        query = self._prepare(q, k, v, layer, save_kv_cache, others)
        extensions = self._extensions(forward_batch)
        part = self._chunks(query, k, v, extensions, layer)
        self.add_prefixes(part, query, extensions, layer)
        return part.output.flatten(1)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **others: Any
    ) -> torch.Tensor:
        """Attention of one new token for each request."""
        query = self._prepare(q, k, v, layer, save_kv_cache, others)
        assert self.decode is not None
        queries = self.shards.all_queries(query, layer.tp_k_head_num)
        spans, pages = self.decode
        part = self.shards.merged(self._attend_stored(queries, spans, pages, layer), layer.tp_k_head_num)
        self.moves[Move.QUERIES] += query.shape[0]
        return part.output.flatten(1)

    def _prepare(self, q: Any, k: Any, v: Any, layer: Any, save_kv_cache: bool, others: dict[str, Any]) -> torch.Tensor:
        """Write new keys and values. Return the queries, ``[rows, heads, width]``."""
        refuse_layer(layer, k, v, save_kv_cache)
        refuse_unknown(layer, others, LACKS)
        if layer.attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"attention layer {layer.layer_id} is not causal; serve this model without --dcp-size"
            )
        assert self.places is not None
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(self.places[: k.shape[0]]), k, v)
        return q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)

    def _extensions(self, batch: Any) -> list[Extension]:
        if "extensions" not in self.common:
            if batch.forward_mode.is_target_verify():
                raise NotImplementedError(
                    f"drafts cannot be verified with --dcp-size {self.shards.count}; leave one out"
                )
            # The rows in the table of KV slots stay on the GPU. To read them here would wait for the step before.
            self.common["rows"] = batch.req_pool_indices
            lengths = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)
            self.common["extensions"] = [Extension(i, int(prefix), int(new)) for i, (prefix, new) in enumerate(lengths)]
        return self.common["extensions"]

    def _chunks(self, query: torch.Tensor, k: Any, v: Any, extensions: list[Extension], layer: Any) -> Part:
        """Attention of each request's new tokens to themselves. Rows that only fill up the batch are 0."""
        if "chunks" not in self.common:
            self.common["chunks"] = Spans.of([extension.new for extension in extensions], self.device)
        spans, rows = self.common["chunks"], sum(extension.new for extension in extensions)
        key = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)[:rows]
        value = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)[:rows]
        options = {"scale": layer.scaling, "cap": layer.logit_cap}
        part = self.kernels.attend_rows(query[:rows], key, value, spans, spans, causal=True, **options)
        if rest := query[rows:].shape[0]:
            nothing = Part(query.new_zeros(rest, *part.output.shape[1:]), no_lse(query[rows:]))
            part = Part(torch.cat([part.output, nothing.output]), torch.cat([part.lse, nothing.lse]))
        return part

    def _key_bytes(self, layer: Any) -> int:
        width = layer.qk_head_dim + layer.v_head_dim
        return int(layer.tp_k_head_num * width * self._buffers(layer)[0].element_size())

    def _attend_to_shards(self, queries: torch.Tensor, moving: Moving, layer: Any) -> Part:
        if (place := ("shards", moving.indices)) not in self.common:
            rows = self.common["rows"][torch.tensor(moving.indices).to(self.device)]
            lengths = self.shards.lengths(torch.tensor(moving.prefixes)).to(self.device)
            self.common[place] = self._spans(moving), self._pages(rows, lengths, max(moving.prefixes))
        spans, pages = self.common[place]
        return self._attend_stored(queries, spans, pages, layer)

    def _stored(self, moving: Moving, layer: Any) -> list[torch.Tensor]:
        if (place := ("stored", moving.indices)) not in self.common:
            counts = self.shards.lengths(torch.tensor(moving.prefixes))
            requests = torch.tensor(moving.indices).repeat_interleave(counts).to(self.device)
            keys = torch.cat([torch.arange(count) for count in counts.tolist()])
            positions = (keys * self.shards.count + self.shards.rank).to(self.device)
            self.common[place] = self.shards.rows(self.table[self.common["rows"][requests], positions])
        return [buffer[self.common[place]] for buffer in self._buffers(layer)]

    def _attend_to_prefixes(
        self, query: torch.Tensor, prefixes: list[list[torch.Tensor]], moving: Moving, layer: Any
    ) -> Part:
        if (place := ("prefixes", moving.indices)) not in self.common:
            self.common[place] = self._spans(moving), Spans.of(moving.prefixes, self.device)
        key, value = (torch.cat(each) for each in zip(*prefixes, strict=True))
        options = {"scale": layer.scaling, "cap": layer.logit_cap}
        return self.kernels.attend_rows(query, key, value, *self.common[place], causal=False, **options)

    def _spans(self, moving: Moving) -> Spans:
        return Spans.of([extension.new for _, extension in moving.members], self.device)

    def _attend_stored(self, queries: torch.Tensor, spans: Spans, pages: Pages, layer: Any) -> Part:
        keys, values = (paged_view(buffer, self.page_size) for buffer in self._buffers(layer))
        options = {"scale": layer.scaling, "cap": layer.logit_cap}
        return attend_stored(self.kernels, queries, keys, values, spans, pages, **options)

    def _buffers(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _pages_of_decode(self, batch: Any, requests: int) -> Pages:
        lengths = batch.seq_lens[:requests]
        most = self.table.shape[1]  # the longest request that there may be
        if batch.seq_lens_cpu is not None and batch.seq_lens_cpu.numel():
            most = min(most, int(batch.seq_lens_cpu.max()))
        return self._pages(batch.req_pool_indices[:requests], self.shards.lengths(lengths), max(1, most))

    def _pages(self, rows: torch.Tensor, lengths: torch.Tensor, most: int) -> Pages:
        """Where this rank stores its part of requests.

        Args:
            rows: The requests' rows in the table of KV slots.
            lengths: The tokens of each request that this rank stores.
            most: The tokens of the longest request.
        """
        firsts = self.table[:, : most : self.stride][rows]  # of each page of the allocator
        return Pages((firsts // self.stride).to(torch.int32), lengths.to(torch.int32))


@extends(
    "sglang.srt.layers.attention.attention_registry:register_attention_backend",
    "The name fa3 stands for our backend on ranks that divide tokens.",
)
@relies_on(
    "sglang.srt.layers.attention.attention_registry:create_flashattention_v3_backend",
    "It makes SGLang's backend, which serves all other ranks.",
)
def make_backend(model_runner: Any) -> AttentionBackend:
    """Return our backend for D ranks that divide tokens, and SGLang's own backend for all others.

    Raises:
        Refused: the KV cache has another dtype than the model, or a layout that is not served.
    """
    group = get_dcp_group_no_assert()
    if group is None or group.world_size == 1:
        return create_flashattention_v3_backend(model_runner)
    stored, computed = model_runner.kv_cache_dtype, model_runner.dtype
    if stored != computed:
        raise OTHER_DTYPE(stored=stored, computed=computed, D=group.world_size)
    if getattr(model_runner.token_to_kv_pool, "use_hnd", False):
        raise OTHER_LAYOUT(D=group.world_size)
    return Fa3ShardedBackend(model_runner, TokenShards(group), FlashAttention3())


def register() -> None:
    """Put :func:`make_backend` into SGLang's registry. A process with our flags calls it before SGLang's backends."""
    register_attention_backend(NAME)(make_backend)
