"""SGLang's attention backend of the CPU platform, under the name :data:`~sglang_shift.platforms.cpu.ATTENTION`.

It has what ``torch_native`` lacks: a cap of the scores, attention sinks, the log-sum-exp, and KV pools with a part for
sliding windows. It computes no row of a cached prefix, and decodes requests of similar lengths together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_shift.platforms.attention import Part, add_sinks, attend, attend_batch
from sglang_shift.platforms.sparse_attention import SparseStep, attend_sparsely
from sglang_shift.seams import extends, relies_on

# Where keys are in a pool: slots in any order, or a slice if the slots are consecutive. A slice needs no copy.
Slots: TypeAlias = torch.Tensor | slice

# Requests are decoded together if the longest has at most this many times the keys of the shortest, or few more keys.
SPREAD, FEW_KEYS = 1.25, 64


class Extension(NamedTuple):
    """The new tokens of one request in a step.

    Attributes:
        row: The request's row in the table of KV slots.
        prefix: The number of tokens whose keys are in the KV cache already.
        new: The number of new tokens.
        visible: ``[new, prefix + new]``, bool: which keys a token attends to, if that is no causal order.
    """

    row: int
    prefix: int
    new: int
    visible: torch.Tensor | None = None


class Together(NamedTuple):
    """Requests that are decoded together.

    Attributes:
        members: The indices of the requests in the batch.
        slots: Of all their keys, request by request. Shorter requests repeat their last slot.
        visible: ``[requests, 1, 1, keys]``, bool: which of them count; None for all.
    """

    members: torch.Tensor
    slots: Slots
    visible: torch.Tensor | None


@extends("sglang.srt.layers.attention.base_attn_backend:AttentionBackend", "attention of every model on a CPU")
class CpuAttentionBackend(AttentionBackend):
    """Attention over SGLang's KV pools by :mod:`sglang_shift.platforms.attention`.

    Args:
        model_runner: SGLang's model runner.
        ahead: Tokens that a decode attends to beyond the lengths of the batch: those that a draft model has proposed.

    Attributes:
        sparse: The requests of the step that leave out blocks of their prefixes; None if all attention is exact.
    """

    sparse: SparseStep | None = None

    def __init__(self, model_runner: Any, ahead: int = 0) -> None:
        super().__init__()
        self.ahead = ahead
        self.device = model_runner.device
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        pool = self.token_to_kv_pool
        # Layers with a sliding window have slots of their own there.
        self.window_pool = pool if isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0 else None
        self.window_slots_of_new: torch.Tensor | None = None
        self.extensions: list[Extension] | None = None
        self.slots: dict[Any, Any] = {}  # of this step, for all layers of a kind
        # SGLang's name for: the tokens of an image attend to each other
        self.images_attend_to_themselves = hasattr(getattr(model_runner, "model", None), "prepare_attn_masks")

    def support_triton(self) -> bool:
        return False

    @relies_on(
        "sglang.srt.models.gemma3_mm:Gemma3ForConditionalGeneration.prepare_attn_masks",
        "This method decides which tokens attend to later tokens, but it only prepares Triton's kernel.",
    )
    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Forget the step before. What the layers of a step have in common is made by the first layer."""
        self.extensions = None
        self.slots = {}
        self.window_slots_of_new = None
        if self.window_pool is not None and forward_batch.out_cache_loc is not None:
            self.window_slots_of_new = self.window_pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc)
        mode = forward_batch.forward_mode
        if self.images_attend_to_themselves and forward_batch.mm_inputs and mode.is_extend():
            self.extensions = list(map(with_images, self._extensions(forward_batch), forward_batch.mm_inputs))

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of prompts, of chunks of prompts, and of drafts that are verified."""
        return self.extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs).output.flatten(1)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of one new token for each request."""
        return self.decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs).output.flatten(1)

    def extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Part:
        """Like :meth:`forward_extend`, with the log-sum-exp. Sinks count in it.

        Returns:
            A part with ``output`` ``[rows, heads, value width]`` and ``lse`` ``[rows, heads]``. Rows that only fill up
            the batch are 0.
        """
        query, _, sinks = self._prepare(q, k, v, layer, batch, save_kv_cache, **kwargs)
        causal = self._is_causal(layer, batch)
        options = {"scale": layer.scaling, "causal": causal, "cap": layer.logit_cap, "window": window_of(layer)}
        keys, values = self._buffers(layer)
        parts, start = [], 0
        for index, extension in enumerate(self._extensions(batch)):
            slots = self._slots_of(index, extension, layer, batch, options["window"])
            rows = query[start : start + extension.new]
            visible = extension.visible
            key, value = gather(keys, values, slots, query.dtype)
            start += extension.new
            if self.sparse is not None and index in self.sparse.records and causal and options["window"] is None:
                bound, record = self.sparse.bound, self.sparse.records[index]
                scale, cap = layer.scaling, layer.logit_cap
                parts.append(attend_sparsely(rows, key, value, scale=scale, cap=cap, bound=bound, record=record))
                continue
            if visible is not None:
                visible = visible[:, visible.shape[1] - key.shape[0] :]
            parts.append(attend(rows, key, value, visible=visible, **options))
        rest = query[start:]  # rows that fill up the batch
        if rest.shape[0] or not parts:
            parts.append(Part(query.new_zeros(*rest.shape[:2], layer.v_head_dim), no_lse(rest)))
        part = parts[0]
        if len(parts) > 1:
            part = Part(torch.cat([each.output for each in parts]), torch.cat([each.lse for each in parts]))
        return part if sinks is None else add_sinks(part, sinks)

    def decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Part:
        """Like :meth:`forward_decode`, with the log-sum-exp. Sinks count in it.

        Returns:
            A part with ``output`` ``[requests, heads, value width]`` and ``lse`` ``[requests, heads]``.
        """
        query, _, sinks = self._prepare(q, k, v, layer, batch, save_kv_cache, **kwargs)
        part = self._attend_together(query, self._together(layer, batch), layer)
        return part if sinks is None else add_sinks(part, sinks)

    def _attend_together(self, query: torch.Tensor, groups: list[Together], layer: Any) -> Part:
        """Attention of one token for each request. A request that is in no group has no keys.

        Args:
            query: ``[requests, heads, width]``. Heads that share keys are neighbours.
            groups: The requests and their keys.
            layer: SGLang's attention layer.
        """
        requests, heads, width = query.shape
        keys, values = self._buffers(layer)
        parts = []
        for group in groups:
            members = query if len(group.members) == requests else query[group.members]
            key, value = gather(keys, values, group.slots, query.dtype)
            together, kv_heads = members.shape[0], key.shape[1]
            part = attend_batch(
                members.view(together, kv_heads, -1, width),  # heads that share keys are its queries
                key.view(together, -1, kv_heads, width).transpose(1, 2),
                value.view(together, -1, kv_heads, layer.v_head_dim).transpose(1, 2),
                scale=layer.scaling,
                cap=layer.logit_cap,
                visible=group.visible,
            )
            parts.append(Part(part.output.reshape(together, heads, -1), part.lse.reshape(together, heads)))
        if len(groups) == 1 and len(groups[0].members) == requests:
            return parts[0]
        whole = Part(query.new_zeros(requests, heads, layer.v_head_dim), no_lse(query))
        for group, own in zip(groups, parts, strict=True):
            whole.output[group.members], whole.lse[group.members] = own
        return whole

    def _prepare(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        batch: Any,
        save_kv_cache: bool,
        *,
        sinks: torch.Tensor | None = None,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Write new keys and values to the pool.

        Returns:
            The queries, ``[rows, heads, width]``, the whole keys if there are new ones, and the sinks.
        """
        refuse_unknown(layer, others)
        if q_rope is not None:  # MLA's rotary part apart
            q = torch.cat([q.view(-1, layer.tp_q_head_num, layer.v_head_dim), q_rope], -1)
        if k_rope is not None:
            k = torch.cat([k, k_rope.view(k.shape[0], 1, -1)], -1)
        if save_kv_cache and k is not None and v is not None:
            self._write(k, v, layer, batch)
        return q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim), k, sinks

    def _write(self, k: torch.Tensor, v: torch.Tensor, layer: Any, batch: Any) -> None:
        slots = batch.encoder_out_cache_loc if layer.is_cross_attention else batch.out_cache_loc
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots, self.window_slots_of_new), k, v)

    def _buffers(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _has_latents(self, layer: Any) -> bool:
        """Whether the pool has MLA's latents: they are keys, and their first columns are the values."""
        keys, values = self._buffers(layer)
        return keys.data_ptr() == values.data_ptr()

    def _is_causal(self, layer: Any, batch: Any) -> bool:
        if layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
            # Tokens of a prompt attend to later ones, and the prompt must be whole for that.
            from sglang.srt.runtime_context import get_schedule

            return get_schedule().chunked_prefill_size != -1
        return not layer.is_cross_attention and layer.attn_type != AttentionType.ENCODER_ONLY

    def _extensions(self, batch: Any) -> list[Extension]:
        if self.extensions is None:
            rows = batch.req_pool_indices.tolist()
            if batch.forward_mode.is_target_verify():
                self.extensions = verified(rows, batch.seq_lens.tolist(), batch.spec_info)
            else:
                lengths = zip(rows, batch.extend_prefix_lens.tolist(), batch.extend_seq_lens.tolist(), strict=True)
                self.extensions = [Extension(*each) for each in lengths]
        return self.extensions

    def _slots_of(self, index: int, extension: Extension, layer: Any, batch: Any, window: int | None) -> torch.Tensor:
        """Where the keys of one request are that its new tokens attend to."""
        translate = self._has_window_slots(layer)
        place = (index, window, translate, layer.is_cross_attention)
        if place not in self.slots:
            start, end = 0, extension.prefix + extension.new
            if window is not None:
                start = max(0, extension.prefix - window)
            if batch.encoder_lens is not None:  # an encoder's keys come first
                encoder = int(batch.encoder_lens[index])
                start, end = (0, encoder) if layer.is_cross_attention else (encoder + start, encoder + end)
            slots = self.req_to_token_pool.req_to_token[extension.row, start:end]
            self.slots[place] = sliced(self._translated(slots) if translate else slots)
        return self.slots[place]

    def _together(self, layer: Any, batch: Any) -> list[Together]:
        """The requests of a decode, in groups of similar lengths."""
        window, translate = window_of(layer), self._has_window_slots(layer)
        place = (window, translate, layer.is_cross_attention)
        if place not in self.slots:
            starts, counts = self._spans(layer, batch, window)
            table, rows = self.req_to_token_pool.req_to_token, batch.req_pool_indices

            def slots_at(member: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                slots = table[rows[member].unsqueeze(1), starts[member].unsqueeze(1) + key]
                return self._translated(slots) if translate else slots

            groups = grouped(counts, slots_at)
            self.slots[place] = groups
        return self.slots[place]

    def _spans(self, layer: Any, batch: Any, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """For each request of a decode, its first key in the table of slots, and the number of its keys."""
        counts = batch.seq_lens.long() + self.ahead
        starts = torch.zeros_like(counts)
        if layer.is_cross_attention:
            return starts, batch.encoder_lens.long()
        if window is not None:
            starts = (counts - 1 - window).clamp(min=0)
        counts = counts - starts
        return (starts if batch.encoder_lens is None else starts + batch.encoder_lens), counts

    def _has_window_slots(self, layer: Any) -> bool:
        return self.window_pool is not None and self.window_pool.layers_mapping[layer.layer_id][1]

    def _translated(self, slots: torch.Tensor) -> torch.Tensor:
        assert self.window_pool is not None
        return self.window_pool.translate_loc_from_full_to_swa(slots.long())


def verified(rows: list[int], lengths: list[int], drafts: Any) -> list[Extension]:
    """The requests of a step that verifies drafts.

    Args:
        rows: The requests' rows in the table of KV slots.
        lengths: The tokens of each request without its drafts.
        drafts: SGLang's ``spec_info``. Its mask has ``[drafts, tokens and drafts]`` elements for each request, one
            request after the other.
    """
    new, mask = drafts.draft_token_num, drafts.custom_mask
    extensions, start = [], 0
    for row, prefix in zip(rows, lengths, strict=True):
        visible, size = None, new * (prefix + new)
        if mask is not None and mask.numel() > 0:
            visible = mask[start : start + size].view(new, -1).bool()
        extensions.append(Extension(row, prefix, new, visible))
        start += size
    return extensions


def with_images(extension: Extension, inputs: Any) -> Extension:
    """Let the tokens of each image among the new tokens attend to each other, as in Gemma 3.

    If a chunk ends inside of an image, the tokens of the chunk do not see the rest, as in SGLang's Triton backend.

    Args:
        extension: The new tokens of a request.
        inputs: SGLang's ``MultimodalInputs`` of the request; None if it has none.
    """
    items = [] if inputs is None else [item for item in inputs.mm_items if item.is_image()]
    spans = [span for item in items for span in item.offsets if span[0] >= extension.prefix]
    if not spans:
        return extension
    prefix, new = extension.prefix, extension.new
    visible = torch.ones(new, prefix + new, dtype=torch.bool).tril(prefix)
    for first, last in spans:
        visible[first - prefix : last + 1 - prefix, first : last + 1] = True
    return extension._replace(visible=visible)


def similar(counts: list[int]) -> list[list[int]]:
    """Indices of ``counts``, from the smallest, in groups whose counts differ little."""
    groups: list[list[int]] = []
    for index in sorted(range(len(counts)), key=counts.__getitem__):
        least = counts[groups[-1][0]] if groups else 0
        if groups and counts[index] <= max(SPREAD * least, least + FEW_KEYS):
            groups[-1].append(index)
        else:
            groups.append([index])
    return [sorted(group) for group in groups]


def grouped(counts: torch.Tensor, slots_at: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[Together]:
    """The requests that have keys, in groups of similar lengths.

    Args:
        counts: ``[requests]``, the number of keys of each request.
        slots_at: Gets indices of requests, ``[members]``, and which keys to read of each, ``[members, keys]``. Returns
            the slots of these keys, ``[members, keys]``.
    """
    present = counts.nonzero()[:, 0]
    groups = []
    for members in similar(counts[present].tolist()):
        member = present[members]
        count = counts[member].unsqueeze(1)
        key = torch.arange(int(count.max()), device=counts.device)
        visible = (key < count)[:, None, None] if int(count.min()) < key.shape[0] else None
        slots = slots_at(member, torch.minimum(key, count - 1))
        groups.append(Together(member, sliced(slots.reshape(-1)), visible))
    return groups


def gather(
    keys: torch.Tensor, values: torch.Tensor, slots: Slots, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values at ``slots``, ``[slots, KV heads, width]``, in ``dtype``."""
    key = take(keys, slots).to(dtype)
    if values.data_ptr() == keys.data_ptr():  # MLA's latents are both
        return key, key[..., : values.shape[-1]]
    return key, take(values, slots).to(dtype)


def take(buffer: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The rows of ``buffer`` at ``slots``. PyTorch copies rows of two dimensions faster than rows of three."""
    if isinstance(slots, slice):
        return buffer[slots]
    if not buffer.is_contiguous():  # its rows cannot be flattened without a copy of the pool
        return buffer.index_select(0, slots)
    return buffer.view(buffer.shape[0], -1).index_select(0, slots).view(-1, *buffer.shape[1:])


def sliced(slots: torch.Tensor) -> Slots:
    """``slots``, as a slice if they are consecutive: those of a prompt often are."""
    if slots.shape[0] == 0:
        return slots
    first, last = int(slots[0]), int(slots[-1])
    if last - first == slots.shape[0] - 1 and bool((slots.diff() == 1).all()):
        return slice(first, last + 1)
    return slots


def no_lse(query: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of no keys, ``[rows, heads]``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.full(query.shape[:2], -math.inf, dtype=dtype, device=query.device)


def window_of(layer: Any) -> int | None:
    """How many tokens before its own a token of this layer attends to; None for all.

    If the layer is not causal, a token also attends to as many tokens after its own.
    """
    size = layer.sliding_window_size
    return None if layer.is_cross_attention or size is None or size < 0 else size


CPU_LACKS = "which the CPU platform's attention backend does not have; serve this model on a GPU"


def refuse_unknown(layer: Any, others: dict[str, Any], reason: str = CPU_LACKS) -> None:
    """Refuse what would silently be left out.

    Args:
        layer: SGLang's attention layer.
        others: The arguments of its call that the backend does not know.
        reason: The end of the message: why it is refused, and what to do.

    Raises:
        NotImplementedError: the layer or its call needs something that this backend does not have.
    """
    missing = [name for name, value in others.items() if value is not None]
    if layer.xai_temperature_len > 0:
        missing.append("xai_temperature_len")
    if layer.pos_encoding_mode != "NONE":
        missing.append(f"pos_encoding_mode {layer.pos_encoding_mode}")
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        missing.append(f"logit_capping_method {layer.logit_capping_method}")
    if missing:
        raise NotImplementedError(f"attention layer {layer.layer_id} needs {', '.join(missing)}, {reason}")
