"""The CPU platform's attention backend over KV pools, against SGLang's torch_native and against plain attention."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms import attention
from sglang_shift.platforms.attention import add_sinks, attend
from sglang_shift.platforms.attention_backend import CpuAttentionBackend, similar, sliced

HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 16, 400


class Pool:
    """A KV pool of one layer, with keys of other tokens in all other slots."""

    def __init__(self, width=WIDTH, kv_heads=KV_HEADS, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.keys, self.values = torch.randn(2, SLOTS, kv_heads, width, generator=generator).to(dtype)

    def get_key_buffer(self, layer_id):
        return self.keys

    def get_value_buffer(self, layer_id):
        return self.values

    def set_kv_buffer(self, layer, places, k, v):
        self.keys[places.loc] = k.to(self.keys.dtype)
        self.values[places.loc] = v.to(self.values.dtype)


class LatentPool(Pool):
    """MLA's pool: the values are the first columns of the keys."""

    def __init__(self):
        super().__init__(width=24, kv_heads=1)
        self.values = self.keys[..., :WIDTH]

    def set_kv_buffer(self, layer, places, k, v):
        self.keys[places.loc] = k


class WindowPool(SWAKVPool):
    """A pool in which layer 0 has slots of its own for its sliding window."""

    def __init__(self):
        self.pools, self.swa_layer_nums = [Pool(), Pool()], 1
        self.layers_mapping = {0: (0, True), 1: (0, False)}
        self.full_to_swa_index_mapping = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))

    def get_key_buffer(self, layer_id):
        return self.pools[layer_id].keys

    def get_value_buffer(self, layer_id):
        return self.pools[layer_id].values

    def set_kv_buffer(self, layer, places, k, v):
        slots = places.swa_loc if self.layers_mapping[layer.layer_id][1] else places.loc
        self.pools[layer.layer_id].keys[slots], self.pools[layer.layer_id].values[slots] = k, v


def layer_of(width=WIDTH, kv_heads=KV_HEADS, **others):
    return RadixAttention(HEADS, width, 0.3, kv_heads, **{"layer_id": 0, "v_head_dim": WIDTH, **others})


class Requests:
    """Requests with cached and new tokens, their slots anywhere in the pool, and a step of them."""

    def __init__(self, prefixes, news, mode, pool=None, width=WIDTH, kv_heads=KV_HEADS, padding=0):
        generator = torch.Generator().manual_seed(2)
        self.pool = pool or Pool()
        self.prefixes, self.news = prefixes, news
        lengths = [prefix + new for prefix, new in zip(prefixes, news, strict=True)]
        slots = torch.randperm(SLOTS - 1, generator=generator)[: sum(lengths)] + 1
        self.slots = list(slots.split(lengths)) if lengths else []
        table = torch.zeros(len(lengths) + 2, SLOTS, dtype=torch.int32)
        rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)]
        for row, own in zip(rows, self.slots, strict=True):
            table[row, : own.shape[0]] = own
        total = sum(news) + padding
        self.q = torch.randn(total, HEADS * width, generator=generator)
        self.k = torch.randn(sum(news), kv_heads, width, generator=generator)
        self.v = torch.randn(sum(news), kv_heads, WIDTH, generator=generator)
        if isinstance(self.pool, LatentPool):
            self.v = self.k[..., :WIDTH]
        self.batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=rows,
            seq_lens=torch.tensor(lengths),
            out_cache_loc=torch.cat(
                [slots[:0], *(own[prefix:] for own, prefix in zip(self.slots, prefixes, strict=True))]
            ),
            extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
            extend_seq_lens=torch.tensor(news, dtype=torch.int32),
            encoder_lens=None,
            spec_info=None,
        )
        self.runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=self.pool
        )

    def run(self, backend, layer, **kwargs):
        backend = backend(self.runner)
        backend.init_forward_metadata(self.batch)
        return backend.forward(self.q, self.k, self.v, layer, self.batch, **kwargs)

    def expected(self, sinks=None, layer_id=0, translate=None, **options):
        """Attention of each request on its own, ``[new tokens, heads * width]``."""
        outputs, start = [], 0
        keys, values = self.pool.get_key_buffer(layer_id), self.pool.get_value_buffer(layer_id)
        for own, new in zip(self.slots, self.news, strict=True):
            slots = own if translate is None else translate[own]
            query = self.q[start : start + new].view(new, HEADS, self.q.shape[1] // HEADS)
            part = attend(query, keys[slots].float(), values[slots].float(), scale=0.3, **options)
            outputs.append((part if sinks is None else add_sinks(part, sinks)).output.flatten(1))
            start += new
        return torch.cat(outputs)


EXTEND, DECODE = ForwardMode.EXTEND, ForwardMode.DECODE
STEPS = {
    "prompts of odd lengths": ((0, 0, 0), (1, 2, 37), EXTEND),
    "chunks": ((0, 64, 5), (9, 33, 1), EXTEND),
    "a request without new tokens": ((7, 5), (0, 3), EXTEND),
    "decodes of similar lengths": ((20, 21, 30), (1, 1, 1), DECODE),
    "decodes of all lengths": ((0, 200, 31, 1), (1, 1, 1, 1), DECODE),
}


def requests_of(step, **others):
    return Requests(*STEPS[step], **others)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [-1, 0, 8, 500])
def test_plain_attention_is_that_of_torch_native(step, window):
    layer = layer_of(sliding_window_size=window or -1)
    theirs = requests_of(step).run(TorchNativeAttnBackend, layer)
    ours = requests_of(step).run(CpuAttentionBackend, layer)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 8])
def test_caps_sinks_and_windows(step, cap, with_sinks, window):
    requests = requests_of(step)
    sinks = torch.linspace(-1, 1, HEADS) if with_sinks else None
    layer = layer_of(logit_cap=cap, sliding_window_size=-1 if window is None else window)
    out = requests.run(CpuAttentionBackend, layer, sinks=sinks)
    torch.testing.assert_close(out, requests.expected(sinks=sinks, cap=cap, window=window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("apart", [False, True])
def test_latents_of_mla(step, apart):
    """The rotary part of queries and keys may come apart."""
    requests = requests_of(step, pool=LatentPool(), width=24, kv_heads=1)
    layer = layer_of(width=24, kv_heads=1)
    backend = CpuAttentionBackend(requests.runner)
    backend.init_forward_metadata(requests.batch)
    q, k, ropes = requests.q, requests.k, {}
    if apart:
        heads = q.view(-1, HEADS, 24)
        ropes = {"q_rope": heads[..., WIDTH:], "k_rope": k[..., WIDTH:]}
        q, k = heads[..., :WIDTH].reshape(-1, HEADS * WIDTH), k[..., :WIDTH]
    out = backend.forward(q, k, requests.v, layer, requests.batch, **ropes)
    torch.testing.assert_close(out, requests.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_latents_are_not_copied_to_be_values(step, monkeypatch):
    storages = []
    fused = attention.flash

    def recorded(q, k, v, *others, **options):
        storages.append((k.untyped_storage().data_ptr(), v.untyped_storage().data_ptr()))
        return fused(q, k, v, *others, **options)

    monkeypatch.setattr(attention, "flash", recorded)
    requests_of(step, pool=LatentPool(), width=24, kv_heads=1).run(CpuAttentionBackend, layer_of(width=24, kv_heads=1))
    assert storages
    assert all(key == value for key, value in storages)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("layer_id", [0, 1])
def test_slots_for_sliding_windows(step, layer_id):
    """A layer with a window reads and writes the slots of its own."""
    requests = requests_of(step, pool=WindowPool())
    window = 8 if layer_id == 0 else None
    translate = requests.pool.full_to_swa_index_mapping if layer_id == 0 else None
    out = requests.run(CpuAttentionBackend, layer_of(layer_id=layer_id, sliding_window_size=window))
    expected = requests.expected(layer_id=layer_id, translate=translate, window=window)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_an_fp8_cache(step):
    requests = requests_of(step, pool=Pool(dtype=torch.float8_e4m3fn))
    out = requests.run(CpuAttentionBackend, layer_of())
    torch.testing.assert_close(out, requests.expected(), atol=1e-5, rtol=1e-5)


def test_drafts_attend_to_their_ancestors():
    requests = Requests((5, 9), (3, 3), ForwardMode.TARGET_VERIFY)
    trees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    masks = [torch.cat([torch.ones(3, prefix), tree], 1).bool() for prefix, tree in zip((5, 9), trees, strict=True)]
    batch = requests.batch
    batch.seq_lens = torch.tensor([5, 9])  # SGLang does not count the drafts
    batch.extend_prefix_lens = batch.extend_seq_lens = None
    batch.spec_info = SimpleNamespace(draft_token_num=3, custom_mask=torch.cat([mask.flatten() for mask in masks]))
    out = requests.run(CpuAttentionBackend, layer_of())
    keys, values = requests.pool.keys, requests.pool.values
    for request, (own, mask) in enumerate(zip(requests.slots, masks, strict=True)):
        query = requests.q[3 * request : 3 * request + 3].view(3, HEADS, WIDTH)
        part = attend(query, keys[own], values[own], scale=0.3, visible=mask)
        torch.testing.assert_close(out[3 * request : 3 * request + 3], part.output.flatten(1))


@pytest.mark.parametrize("window", [None, 4])
def test_tokens_of_an_image_attend_to_each_other(window):
    """Three prompts: with an image among the new tokens, with one in the cache, and with none."""
    requests = Requests((2, 7, 0), (8, 3, 5), EXTEND)
    spans = [[(3, 6)], [(1, 4)], []]
    requests.batch.mm_inputs = [
        SimpleNamespace(mm_items=[SimpleNamespace(is_image=lambda: True, offsets=each)]) if each else None
        for each in spans
    ]
    requests.runner.model = SimpleNamespace(prepare_attn_masks=None)
    out = requests.run(CpuAttentionBackend, layer_of(sliding_window_size=-1 if window is None else window))
    start = 0
    for own, prefix, new, images in zip(requests.slots, requests.prefixes, requests.news, spans, strict=True):
        place, token = torch.arange(prefix + new), torch.arange(prefix, prefix + new).unsqueeze(1)
        visible = place <= token
        for first, last in images:
            visible |= (first <= place) & (place <= last) & (first <= token) & (token <= last)
        if window is not None:
            visible &= place >= token - window
        query = requests.q[start : start + new].view(new, HEADS, WIDTH)
        part = attend(query, requests.pool.keys[own], requests.pool.values[own], scale=0.3, visible=visible)
        torch.testing.assert_close(out[start : start + new], part.output.flatten(1), atol=1e-5, rtol=1e-5)
        start += new


@pytest.mark.parametrize("window", [None, 4])
def test_an_encoder_attends_to_later_tokens(window):
    requests = requests_of("prompts of odd lengths")
    layer = layer_of(attn_type=AttentionType.ENCODER_ONLY, sliding_window_size=-1 if window is None else window)
    out = requests.run(CpuAttentionBackend, layer)
    torch.testing.assert_close(out, requests.expected(causal=False, window=window), atol=1e-5, rtol=1e-5)


def test_rows_that_fill_up_a_batch_are_zero():
    requests = Requests((0,), (5,), EXTEND, padding=3)
    out = requests.run(CpuAttentionBackend, layer_of())
    torch.testing.assert_close(out[:5], requests.expected())
    assert not out[5:].any()


def test_an_empty_batch():
    requests = Requests((), (), EXTEND)
    assert requests.run(CpuAttentionBackend, layer_of()).shape == (0, HEADS * WIDTH)


def test_the_log_sum_exp_counts_sinks():
    requests, sinks = requests_of("decodes of all lengths"), torch.zeros(HEADS)
    backend = CpuAttentionBackend(requests.runner)
    backend.init_forward_metadata(requests.batch)
    part = backend.decode(requests.q, requests.k, requests.v, layer_of(), requests.batch, sinks=sinks)
    for request, own in enumerate(requests.slots):
        query = requests.q[request].view(1, HEADS, WIDTH)
        alone = add_sinks(attend(query, requests.pool.keys[own], requests.pool.values[own], scale=0.3), sinks)
        torch.testing.assert_close(part.lse[request], alone.lse[0])


@pytest.mark.parametrize("step", STEPS)
def test_keys_in_consecutive_slots_are_not_copied(step):
    requests = requests_of(step)
    backend = CpuAttentionBackend(requests.runner)
    table, start = requests.runner.req_to_token_pool.req_to_token, 1
    for row, own in zip(requests.batch.req_pool_indices, requests.slots, strict=True):
        own.copy_(torch.arange(start, start + len(own)))
        table[row, : len(own)] = own
        start += len(own)
    requests.batch.out_cache_loc = torch.cat(
        [own[prefix:] for own, prefix in zip(requests.slots, requests.prefixes, strict=True)]
    )
    backend.init_forward_metadata(requests.batch)
    out = backend.forward(requests.q, requests.k, requests.v, layer_of(), requests.batch)
    torch.testing.assert_close(out, requests.expected(), atol=1e-5, rtol=1e-5)
    copies = [slots for slots in backend.slots.values() if isinstance(slots, torch.Tensor)]
    assert not copies


def test_slots_are_a_slice_only_if_they_are_consecutive():
    assert sliced(torch.tensor([4, 5, 6])) == slice(4, 7)
    assert sliced(torch.tensor([7])) == slice(7, 8)
    for others in ([], [4, 6], [5, 4], [4, 4, 6], [4, 6, 5, 7]):
        assert isinstance(sliced(torch.tensor(others, dtype=torch.int32)), torch.Tensor)


def test_requests_of_similar_lengths_are_decoded_together():
    assert similar([1000, 10, 1200, 70, 3000, 1251]) == [[1, 3], [0, 2], [5], [4]]
    assert similar([]) == []


@pytest.mark.parametrize(
    ("layer", "kwargs", "what"),
    [
        ({}, {"topk_indices": torch.zeros(1)}, "topk_indices"),
        ({"pos_encoding_mode": "ALIBI"}, {}, "pos_encoding_mode ALIBI"),
        ({"logit_cap": 1.0, "logit_capping_method": "other"}, {}, "logit_capping_method other"),
    ],
)
def test_what_the_backend_lacks_is_refused(layer, kwargs, what):
    requests = requests_of("chunks")
    with pytest.raises(NotImplementedError, match=f"layer 0 needs {what}, which the CPU platform's attention backend"):
        requests.run(CpuAttentionBackend, layer_of(**layer), **kwargs)


def test_temperature_by_length_is_refused():
    requests, layer = requests_of("chunks"), layer_of()
    layer.xai_temperature_len = 8
    with pytest.raises(NotImplementedError, match="xai_temperature_len"):
        requests.run(CpuAttentionBackend, layer)


def test_an_argument_that_is_none_is_no_argument():
    requests = requests_of("chunks")
    assert torch.equal(requests.run(CpuAttentionBackend, layer_of(), topk_indices=None), requests.expected())
