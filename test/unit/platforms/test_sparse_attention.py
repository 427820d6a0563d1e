"""Attention that leaves out blocks of a prefix, against a search with loops and against attention to all keys."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms.attention import attend
from sglang_shift.platforms.attention_backend import CpuAttentionBackend
from sglang_shift.platforms.sparse_attention import (
    BLOCK,
    LOCAL_BLOCKS,
    QUERY_BLOCK,
    DroppedMass,
    SparseStep,
    attend_sparsely,
    choose_blocks,
    scores_of,
)

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 16, 0.3
# New tokens and the prefix: whole blocks, odd lengths, one block to choose from, and none.
LENGTHS = [(128, 640), (70, 701), (1, 500), (130, BLOCK * (2 + LOCAL_BLOCKS)), (65, 100), (5, 0)]


def tokens(new, prefix, dtype=torch.float64, spread=3.0):
    """Queries, keys and values of one request. A large spread makes the softmax uneven, as in a trained model."""
    generator = torch.Generator().manual_seed(new + prefix)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = spread * random(new, HEADS, WIDTH), random(new + prefix, KV_HEADS, WIDTH)
    return tuple(x.to(dtype) for x in (query, key, random(new + prefix, KV_HEADS, WIDTH)))


def shares_of(query, key, cap=0.0):
    """``[new, heads, keys]``: the softmax of causal attention, as it is defined."""
    new, keys = query.shape[0], key.shape[0]
    scores = torch.einsum("qhd,khd->qhk", query, key.repeat_interleave(HEADS // KV_HEADS, 1)) * SCALE
    if cap:
        scores = cap * torch.tanh(scores / cap)
    hidden = torch.arange(keys) > torch.arange(keys - new, keys).unsqueeze(1)
    return scores.masked_fill(hidden.unsqueeze(1), -math.inf).softmax(-1)


def skipped_by_loops(shares, prefix, bound):
    """``[new, heads, keys]``, bool: the keys that each query leaves out, found one block after the other."""
    skipped = torch.zeros(shares.shape, dtype=torch.bool)
    candidates = range(1, prefix // BLOCK - LOCAL_BLOCKS)
    for start in range(0, shares.shape[0], QUERY_BLOCK):
        for head in range(HEADS):
            rows = shares[start : start + QUERY_BLOCK, head]
            masses = {b: rows[:, b * BLOCK : (b + 1) * BLOCK].sum(1) for b in candidates}
            dropped = torch.zeros_like(rows[:, 0])
            for block in sorted(masses, key=lambda b: float(masses[b].max())):
                dropped = dropped + masses[block]
                if dropped.max() > bound:
                    break
                keys = slice(block * BLOCK, (block + 1) * BLOCK)
                skipped[start : start + QUERY_BLOCK, head, keys] = True
    return skipped


@pytest.mark.parametrize(("new", "prefix"), LENGTHS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("bound", [0.001, 0.1, 0.6])
def test_the_blocks_and_their_masses_are_those_of_a_search(new, prefix, cap, bound):
    query, key, value = tokens(new, prefix)
    shares = shares_of(query, key, cap)
    skipped = skipped_by_loops(shares, prefix, bound)
    record = DroppedMass()
    part = attend_sparsely(query, key, value, scale=SCALE, cap=cap, bound=bound, record=record)

    kept = shares.masked_fill(skipped, 0)
    values = value.repeat_interleave(HEADS // KV_HEADS, 1)
    expected = torch.einsum("qhk,khd->qhd", kept / kept.sum(-1, keepdim=True), values)
    torch.testing.assert_close(part.output, expected)
    dense = attend(query, key, value, scale=SCALE, cap=cap)
    torch.testing.assert_close(part.lse, dense.lse + kept.sum(-1).log())

    masses = (shares * skipped).sum(-1)
    assert record.largest == pytest.approx(float(masses.max()), abs=1e-12)
    assert record.mean == pytest.approx(float(masses.mean()), abs=1e-12)
    assert record.largest <= bound
    assert record.counts.sum() == new * HEADS
    assert record.pairs == HEADS * sum(prefix + i + 1 for i in range(new))
    assert record.computed == record.pairs - int(skipped.sum())
    if prefix > 600 and bound == 0.6:
        assert skipped.any()

    error = (part.output - dense.output).norm(dim=-1)
    largest = values.norm(dim=-1).amax(0)
    assert (error <= 2 * masses * largest + 1e-12).all()


@pytest.mark.parametrize(("new", "prefix"), LENGTHS)
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_without_mass_to_drop_it_is_attention_to_all_keys(new, prefix, cap):
    query, key, value = tokens(new, prefix)
    record = DroppedMass()
    part = attend_sparsely(query, key, value, scale=SCALE, cap=cap, bound=0.0, record=record)
    dense = attend(query, key, value, scale=SCALE, cap=cap)
    torch.testing.assert_close(part.output, dense.output)
    torch.testing.assert_close(part.lse, dense.lse)
    assert (record.largest, record.computed_share) == (0.0, 1.0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_other_precisions_come_close(dtype, bound):
    """In bfloat16 the rounded scores may choose other blocks, so nothing is left out there."""
    query, key, value = tokens(70, 701, dtype)
    part = attend_sparsely(query, key, value, scale=SCALE, bound=bound, record=DroppedMass())
    assert part.output.dtype == dtype
    exact = [x.double() for x in (query, key, value)]
    expected = attend_sparsely(*exact, scale=SCALE, bound=bound, record=DroppedMass())
    torch.testing.assert_close(part.output.double(), expected.output, atol=64 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_not_rounded_to_half_precision(dtype):
    """Rounded to 8 bits, a score of 100 would be wrong by 0.2, and its mass by a fifth."""
    query, key, _ = tokens(130, 300, dtype, spread=25.0)
    scores = scores_of(query[:, 0], key[:, 0], SCALE, 0.0)
    expected = query[:, 0].double() @ key[:, 0].double().T * SCALE
    assert expected.abs().max() > 50
    torch.testing.assert_close(scores.double(), expected, atol=1e-4, rtol=0)


def test_a_block_that_a_single_query_needs_stays():
    """The mean dropped mass of its block would be tiny. A sample of the queries would not see it either."""
    query, key, value = tokens(QUERY_BLOCK, 20 * BLOCK, spread=0.1)
    place = 7 * BLOCK + 5
    key[:BLOCK] += 3  # a sink, which all queries look at
    query += 2
    key[place] = torch.eye(WIDTH)[0] * 40 - 3
    query[30, 0] = torch.eye(WIDTH)[0] * 4
    shares = shares_of(query, key)
    assert shares[30, 0, place] > 0.99
    of_the_block = shares[:, 0, 7 * BLOCK : 8 * BLOCK].sum(-1)
    assert of_the_block.mean() < 0.02
    record = DroppedMass()
    part = attend_sparsely(query, key, value, scale=SCALE, bound=0.05, record=record)
    assert record.computed_share < 0.5
    dense = attend(query, key, value, scale=SCALE)
    assert (part.output[30, 0] - dense.output[30, 0]).norm() <= 0.1 * value.norm(dim=-1).max()


def test_an_even_softmax_leaves_nothing_to_drop():
    query, key, value = tokens(QUERY_BLOCK, 20 * BLOCK)
    record = DroppedMass()
    attend_sparsely(0 * query, key, value, scale=SCALE, bound=0.02, record=record)
    assert record.computed_share == 1


def test_as_many_blocks_as_possible_are_left_out_the_lightest_first():
    shares = torch.tensor([[0.5, 0.01, 0.02, 0.1], [0.1, 0.03, 0.01, 0.3]])
    computed, dropped = choose_blocks(shares, 0.05)
    assert computed.tolist() == [True, False, False, True]
    torch.testing.assert_close(dropped, torch.tensor([0.03, 0.04]))
    computed, dropped = choose_blocks(shares, 0.005)
    assert computed.all() and not dropped.any()


# The figures


def test_percentiles_of_dropped_masses():
    masses = torch.linspace(0, 0.2, 1001, dtype=torch.float64)
    record = DroppedMass()
    assert (record.mean, record.p99, record.largest, record.computed_share) == (0, 0, 0, 1)
    record.add(masses, 100, 60)
    assert record.mean == pytest.approx(0.1)
    assert 0.198 <= record.p99 <= 0.2
    assert (record.largest, record.computed_share) == (0.2, 0.6)
    record.add(torch.zeros(10**6, dtype=torch.float64), 0, 0)
    assert record.p99 <= 1e-8


@pytest.mark.parametrize("mass", [0.0, 1e-9, 1e-8, 3.1e-4, 0.05, 0.999, 1.0])
def test_a_percentile_is_no_smaller_than_the_mass(mass):
    record = DroppedMass()
    record.add(torch.full((7,), mass, dtype=torch.float64), 7, 7)
    record.add(torch.ones(0, dtype=torch.float64).new_tensor([1.0]), 1, 1)  # so that the largest does not limit it
    record.counts[-1] -= 1
    assert mass <= record.p99 <= max(1.1 * mass, 1.1e-8)


def test_figures_of_several_ranks_add_up():
    masses = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, first, second = DroppedMass(), DroppedMass(), DroppedMass()
    whole.add(masses, 90, 40)
    first.add(masses[:200], 50, 30)
    second.add(masses[200:], 40, 10)
    first.include(second.numbers())
    assert first.numbers() == pytest.approx(whole.numbers())


# The backend


class Pool:
    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def get_key_buffer(self, layer_id):
        return self.keys

    def get_value_buffer(self, layer_id):
        return self.values


def test_only_the_requests_of_the_step_that_may_leave_out_blocks_do():
    """Three equal requests, of which the second may. A layer with a sliding window is exact."""
    new, prefix, bound = 70, 640, 0.3
    query, key, value = tokens(new, prefix, torch.float32)
    slots = torch.arange(3 * (prefix + new)).view(3, -1)
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=slots),
        token_to_kv_pool=Pool(key.repeat(3, 1, 1), value.repeat(3, 1, 1)),
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, req_pool_indices=torch.arange(3), out_cache_loc=None, encoder_lens=None,
        extend_prefix_lens=torch.tensor([prefix] * 3), extend_seq_lens=torch.tensor([new] * 3), mm_inputs=None,
    )  # fmt: skip
    backend, record = CpuAttentionBackend(runner), DroppedMass()
    backend.init_forward_metadata(batch)
    backend.sparse = SparseStep(bound, {1: record})
    layer = RadixAttention(HEADS, WIDTH, SCALE, KV_HEADS, layer_id=0)
    part = backend.extend(query.repeat(3, 1, 1).flatten(1), None, None, layer, batch)
    dense = attend(query, key, value, scale=SCALE)
    sparse = attend_sparsely(query, key, value, scale=SCALE, bound=bound, record=DroppedMass())
    assert record.computed_share < 1
    for index, expected in enumerate((dense, sparse, dense)):
        rows = slice(index * new, (index + 1) * new)
        torch.testing.assert_close(part.output[rows], expected.output)
        torch.testing.assert_close(part.lse[rows], expected.lse)

    window = RadixAttention(HEADS, WIDTH, SCALE, KV_HEADS, layer_id=0, sliding_window_size=prefix)
    backend.init_forward_metadata(batch)
    part = backend.extend(query.repeat(3, 1, 1).flatten(1), None, None, window, batch)
    exact = attend(query, key, value, scale=SCALE, window=prefix)
    torch.testing.assert_close(part.output[new : 2 * new], exact.output)
