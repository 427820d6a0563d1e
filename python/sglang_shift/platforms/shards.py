"""The ranks that divide a KV cache by token, what moves between them, and how attention to a prefix meets its keys.

Every attention backend over such a cache has a :class:`TokenShards` and is a :class:`DividedPrefixes`: ours of the CPU
platform (:mod:`sglang_shift.platforms.token_shards`), and ours of FlashAttention 3
(:mod:`sglang_shift.platforms.fa3_shards`). So both store each token on the same rank, and move the same bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from sglang_shift.errors import Refusal
from sglang_shift.platforms.attention import Part, merge, merge_all
from sglang_shift.platforms.attention_backend import Extension, no_lse
from sglang_shift.platforms.kv_move import Move, MoveRule
from sglang_shift.seams import relies_on

FUSED_WRITES = Refusal(
    "--dcp-size {D} is not served for {name} with --attention-backend {backend} on GPUs; give --attention-backend fa3, "
    "or leave --dcp-size out",
    "SGLang's code of this model rotates keys and writes them in one kernel, which does not divide them by token. Our "
    "backend of FlashAttention 3 keeps it from that.",
)


class Group(Protocol):
    """The parts of SGLang's ``GroupCoordinator`` that move queries and keys."""

    world_size: int
    rank_in_group: int

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None: ...

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None: ...


@relies_on(
    "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc_extend",
    "The first slot of a page of D is a multiple of D. So a token's slot names its owner, as its position does.",
)
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


class Moving(NamedTuple):
    """Requests of a step whose prefixes meet their new tokens in the same way.

    Attributes:
        members: The requests, with their indices in the batch.
        rows: The rows of their new tokens in the step.
    """

    members: list[tuple[int, Extension]]
    rows: slice | torch.Tensor

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of the requests in the batch."""
        return tuple(index for index, _ in self.members)

    @property
    def prefixes(self) -> list[int]:
        """The tokens of each prefix."""
        return [extension.prefix for _, extension in self.members]


class DividedPrefixes(ABC):
    """Attention of new tokens to prefixes that ranks divide by token. A backend adds the kernels and its pool.

    Args:
        shards: The ranks that hold the same KV heads as this rank.

    Attributes:
        moves: How many requests have moved what, over all layers and steps.
        common: What the layers of a step have in common.
    """

    def __init__(self, shards: TokenShards) -> None:
        self.shards = shards
        self.moves: Counter[Move] = Counter()
        self.common: dict[Any, Any] = {}

    def add_prefixes(self, part: Part, query: torch.Tensor, extensions: list[Extension], layer: Any) -> None:
        """Add attention to the prefixes. All ranks call it.

        A step moves the queries of all its requests at once, and the prefixes of all others at once.

        Args:
            part: Attention of the new tokens of each request to themselves, which becomes the result.
            query: ``[rows, heads, width]``.
            extensions: The requests.
            layer: SGLang's attention layer.
        """
        kv_heads = layer.tp_k_head_num
        rule = self._rule(query, layer)
        if rule not in self.common:
            self.common[rule] = chosen(rule, extensions, query.device)
        for move, moving in self.common[rule].items():
            self.moves[move] += len(moving.members)
            rows, own = moving.rows, query[moving.rows]
            if move is Move.QUERIES:
                queries = self.shards.all_queries(own, kv_heads)
                prefix = self.shards.merged(self._attend_to_shards(queries, moving, layer), kv_heads)
            else:
                prefixes = self.shards.whole_prefixes(self._stored(moving, layer), moving.prefixes)
                prefix = self._attend_to_prefixes(own, prefixes, moving, layer)
            part.output[rows], part.lse[rows] = merge(prefix, Part(part.output[rows], part.lse[rows]))

    def _rule(self, query: torch.Tensor, layer: Any) -> MoveRule:
        """The rule for this layer: what a token's queries and its key take."""
        widths = layer.qk_head_dim + layer.v_head_dim
        query_bytes = layer.tp_q_head_num * (widths * query.element_size() + no_lse(query[:0]).element_size())
        return MoveRule(self.shards.count, query_bytes, self._key_bytes(layer))

    @abstractmethod
    def _key_bytes(self, layer: Any) -> int:
        """What this rank stores for a token in this layer."""

    @abstractmethod
    def _attend_to_shards(self, queries: torch.Tensor, moving: Moving, layer: Any) -> Part:
        """Attention of the queries of all ranks to the part of each prefix that this rank stores."""

    @abstractmethod
    def _stored(self, moving: Moving, layer: Any) -> list[torch.Tensor]:
        """What this rank stores of the prefixes, prefix by prefix: keys and values, or keys alone."""

    @abstractmethod
    def _attend_to_prefixes(
        self, query: torch.Tensor, prefixes: list[list[torch.Tensor]], moving: Moving, layer: Any
    ) -> Part:
        """Attention of this rank's queries to whole prefixes."""


def chosen(rule: MoveRule, extensions: list[Extension], device: torch.device) -> dict[Move, Moving]:
    """Which requests of a step move what. All ranks choose alike."""
    by_move: dict[Move, list[int]] = {Move.QUERIES: [], Move.KEYS: []}  # the order in which all ranks move them
    for index, extension in enumerate(extensions):
        if (move := rule.choose(extension.new, extension.prefix)) is not Move.NOTHING:
            by_move[move].append(index)
    rows = rows_of(extensions)
    return {
        move: Moving([(index, extensions[index]) for index in members], joined([rows[i] for i in members], device))
        for move, members in by_move.items()
        if members
    }


def joined(rows: list[slice], device: torch.device) -> slice | torch.Tensor:
    """Several slices of rows, in rising order, as one: a slice if nothing is between them. A slice needs no copy."""
    if all(one.stop == other.start for one, other in pairwise(rows)):
        return slice(rows[0].start, rows[-1].stop)
    return torch.cat([torch.arange(each.start, each.stop) for each in rows]).to(device)


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


@relies_on(
    "sglang.srt.models.utils:enable_fused_set_kv_buffer",
    "Code of models that writes keys itself asks this function by its name, and asks for no division by token.",
)
def refuse_fused_writes(model: torch.nn.Module, count: int, backend: str) -> None:
    """Refuse a model whose own code writes keys, where SGLang's backend of GPUs divides them by token.

    Args:
        model: The model.
        count: D.
        backend: The attention backend.

    Raises:
        Refused: a module of the model can write keys itself.
    """
    if count == 1 or backend == "fa3":
        return
    modules = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    if any(hasattr(import_module(name), "enable_fused_set_kv_buffer") for name in modules):
        raise FUSED_WRITES(D=count, name=type(model).__name__, backend=backend)
