"""The CPU platform's attention, against closed formulas in float64 and against attention of transformers."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from sglang_shift.platforms import attention
from sglang_shift.platforms.attention import Part, add_sinks, attend, attend_batch, band, merge


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(new, keys, heads=4, kv_heads=2, width=16, value_width=16):
    """Queries, keys and values of one request."""
    return random(new, heads, width), random(keys, kv_heads, width, seed=1), random(keys, kv_heads, value_width, seed=2)


def formula(query, key, value, *, scale, causal=True, window=None, cap=0.0, visible=None):
    """Attention as it is defined, with all scores at once: the output and the log-sum-exp."""
    new, keys = query.shape[0], key.shape[0]
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->qhk", query, key) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    place, token = torch.arange(keys), torch.arange(keys - new, keys).unsqueeze(1)
    seen = torch.ones(new, keys, dtype=torch.bool)
    if visible is not None:
        seen = visible
    elif causal:
        seen = place <= token
    if window is not None:
        seen = seen & (place >= token - window) & (place <= (token if causal else token + window))
    scores = scores.masked_fill(~seen.unsqueeze(1), -math.inf)
    return Part(torch.einsum("qhk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1))


def assert_same(part, expected, **tolerances):
    torch.testing.assert_close(part.output, expected.output, **tolerances)
    torch.testing.assert_close(part.lse, expected.lse, **tolerances)


# New tokens and all tokens: a token alone, a decode, whole prompts and chunks, odd lengths, and more than one block.
LENGTHS = [(1, 1), (1, 7), (5, 5), (5, 12), (37, 131), (300, 300), (300, 1501), (513, 600)]


@pytest.mark.parametrize(("new", "keys"), LENGTHS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [None, 0, 3, 64, 5000])
def test_causal_attention_is_the_formula(new, keys, cap, window):
    query, key, value = tokens(new, keys)
    options = {"scale": 0.3, "cap": cap, "window": window}
    assert_same(attend(query, key, value, **options), formula(query, key, value, **options))


@pytest.mark.parametrize(("new", "keys"), [(1, 7), (37, 90), (513, 513)])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [None, 0, 3, 64, 5000])
def test_attention_to_later_keys_is_the_formula(new, keys, cap, window):
    query, key, value = tokens(new, keys)
    options = {"scale": 0.3, "cap": cap, "causal": False, "window": window}
    assert_same(attend(query, key, value, **options), formula(query, key, value, **options))


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [None, 4])
def test_a_tree_of_drafts_attends_to_what_its_mask_says(cap, window):
    query, key, value = tokens(4, 11)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    visible = torch.cat([torch.ones(4, 7, dtype=torch.bool), tree], 1)
    options = {"scale": 0.3, "cap": cap, "visible": visible, "window": window}
    assert_same(attend(query, key, value, **options), formula(query, key, value, **options))


@pytest.mark.parametrize(("width", "value_width"), [(24, 16), (16, 24)])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_values_may_be_wider_or_narrower_than_keys(width, value_width, cap):
    query, key, value = tokens(9, 20, width=width, value_width=value_width)
    assert_same(attend(query, key, value, scale=0.2, cap=cap), formula(query, key, value, scale=0.2, cap=cap))


def test_values_may_be_a_part_of_the_keys():
    """MLA has one KV head, and its values are the first columns of its keys."""
    query, key, _ = tokens(9, 20, kv_heads=1, width=24)
    part = attend(query, key, key[..., :16], scale=0.2)
    assert_same(part, formula(query, key, key[..., :16].contiguous(), scale=0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_other_precisions_come_close(dtype, cap):
    query, key, value = (x.to(dtype) for x in tokens(37, 131))
    part = attend(query, key, value, scale=0.3, cap=cap)
    assert part.output.dtype == dtype
    assert part.lse.dtype == torch.float32
    expected = formula(query.double(), key.double(), value.double(), scale=0.3, cap=cap)
    close = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 8 * torch.finfo(dtype).eps}
    assert_same(Part(part.output.double(), part.lse.double()), expected, **close)


def test_no_new_tokens_and_no_keys():
    query, key, value = tokens(0, 12)
    assert attend(query, key, value, scale=0.3).output.shape == (0, 4, 16)
    query, key, value = tokens(3, 0)
    part = attend(query, key, value, scale=0.3, causal=False)
    assert not part.output.any()
    assert (part.lse == -math.inf).all()


def test_an_empty_batch():
    q, k = torch.zeros(0, 4, 1, 16), torch.zeros(0, 2, 5, 16)
    part = attend_batch(q, k, k, scale=0.3)
    assert part.output.shape == (0, 4, 1, 16)
    assert part.lse.shape == (0, 4, 1)


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_requests_of_different_lengths_decode_together(cap):
    q, k, v = random(3, 4, 1, 16), random(3, 2, 9, 16, seed=1), random(3, 2, 9, 16, seed=2)
    lengths = torch.tensor([9, 1, 5])
    visible = (torch.arange(9) < lengths.unsqueeze(1))[:, None, None]
    part = attend_batch(q, k, v, scale=0.3, cap=cap, visible=visible)
    for request, length in enumerate(lengths.tolist()):
        key, value = (x[request, :, :length].transpose(0, 1) for x in (k, v))
        expected = formula(q[request].transpose(0, 1), key, value, scale=0.3, cap=cap)
        assert_same(Part(part.output[request, :, 0], part.lse[request, :, 0]), Part(expected[0][0], expected[1][0]))


# Merging


@pytest.mark.parametrize("cuts", [[0, 1], [5], [3, 4, 10], [0, 0, 12]])
def test_merged_parts_are_attention_to_all_keys(cuts):
    query, key, value = tokens(6, 12)
    whole = attend(query, key, value, scale=0.3, causal=False)
    parts = [
        attend(query, key[low:high], value[low:high], scale=0.3, causal=False)
        for low, high in itertools.pairwise([0, *cuts, 12])
    ]
    for order in itertools.permutations(parts):
        merged = order[0]
        for part in order[1:]:
            merged = merge(merged, part)
        assert_same(merged, whole)


def test_merge_is_that_of_flashinfer():
    """FlashInfer's logarithms have base 2: outputs weigh as 2 to the power of these."""
    one = Part(random(5, 4, 16), random(5, 4))
    other = Part(random(5, 4, 16, seed=1), random(5, 4, seed=1))
    shares = [2 ** (part.lse * math.log2(math.e)) for part in (one, other)]
    output = (one.output * shares[0].unsqueeze(-1) + other.output * shares[1].unsqueeze(-1)) / sum(shares).unsqueeze(-1)
    assert_same(merge(one, other), Part(output, torch.log2(sum(shares)) / math.log2(math.e)))


def test_merge_of_two_empty_parts_is_empty():
    nothing = Part(torch.zeros(2, 3, 4), torch.full((2, 3), -math.inf))
    assert_same(merge(nothing, nothing), nothing)


def test_merge_bears_large_logarithms():
    one = Part(torch.ones(1, 1, 2), torch.full((1, 1), 1e4))
    other = Part(torch.zeros(1, 1, 2), torch.full((1, 1), 1e4))
    torch.testing.assert_close(merge(one, other).output, torch.full((1, 1, 2), 0.5))


# Against transformers


def heads_first(*tensors):
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def mask_of(new, keys, sliding_window=None):
    """The mask of transformers, to be added to the scores."""
    from transformers.masking_utils import causal_mask_function, sliding_window_overlay

    sliding = sliding_window_overlay(sliding_window) if sliding_window else lambda *_: True
    rows = [
        [causal_mask_function(0, 0, q, k) and sliding(0, 0, q, k) for k in range(keys)] for q in range(keys - new, keys)
    ]
    return torch.zeros(new, keys, dtype=torch.float64).masked_fill(~torch.tensor(rows), -math.inf)


@pytest.mark.parametrize(("new", "keys"), [(1, 1), (1, 9), (11, 11), (7, 20)])
@pytest.mark.parametrize("sliding_window", [1, 4, 8, 64])
def test_a_window_is_one_less_than_that_of_transformers(new, keys, sliding_window):
    seen = mask_of(new, keys, sliding_window) == 0
    assert torch.equal(band(new, keys, keys - new, sliding_window - 1), seen)


@pytest.mark.parametrize("sliding_window", [None, 8])
def test_attention_of_gemma_2(sliding_window):
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, key, value = tokens(13, 30)
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    expected, _ = eager_attention_forward(
        module, *heads_first(query, key, value), mask_of(13, 30, sliding_window), scaling=0.7, softcap=1.5
    )
    window = sliding_window and sliding_window - 1
    part = attend(query, key, value, scale=0.7, cap=1.5, window=window)
    torch.testing.assert_close(part.output, expected[0], atol=1e-6, rtol=1e-5)  # its softmax is in float32


@pytest.mark.parametrize("sliding_window", [None, 8])
def test_attention_of_gpt_oss(sliding_window):
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value = tokens(13, 30)
    sinks = random(4, seed=3)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    expected, _ = eager_attention_forward(
        module, *heads_first(query, key, value), mask_of(13, 30, sliding_window), scaling=0.7
    )
    window = sliding_window and sliding_window - 1
    part = add_sinks(attend(query, key, value, scale=0.7, window=window), sinks)
    torch.testing.assert_close(part.output, expected[0])


def test_a_sink_is_one_more_key():
    query, key, value = tokens(5, 9)
    without = formula(query, key, value, scale=0.3)
    sinks = random(4, seed=3)
    part = add_sinks(without, sinks)
    torch.testing.assert_close(part.lse, torch.log(torch.exp(without.lse) + torch.exp(sinks)))
    torch.testing.assert_close(part.output, without.output * torch.exp(without.lse - part.lse).unsqueeze(-1))


# Memory


@pytest.mark.parametrize("window", [None, 100])
def test_scores_exist_for_one_block_only(window, monkeypatch):
    """A long prompt with capped scores must not have all its scores in memory."""
    blocks = []
    block = attention._eager_block

    def recorded(q, k, *others):
        blocks.append((q.shape[2], k.shape[2]))
        return block(q, k, *others)

    monkeypatch.setattr(attention, "_eager_block", recorded)
    attend(*tokens(2000, 3000, heads=1, kv_heads=1), scale=0.3, cap=1.5, window=window)
    assert max(queries for queries, _ in blocks) == attention.QUERY_BLOCK
    assert max(keys for _, keys in blocks) <= attention.KEY_BLOCK


def test_keys_of_shared_heads_are_not_copied(monkeypatch):
    seen = []
    fused = attention.flash

    def recorded(q, k, *others, **options):
        seen.append(k.untyped_storage().data_ptr())
        return fused(q, k, *others, **options)

    monkeypatch.setattr(attention, "flash", recorded)
    query, key, value = tokens(300, 700)
    attend(query, key, value, scale=0.3)
    attend(query, key, value, scale=0.3, window=50)
    assert set(seen) == {key.untyped_storage().data_ptr()}
