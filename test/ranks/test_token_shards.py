"""Attention over KV caches that ranks divide by token, against attention of one rank that has all of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from divided_requests import (
    HEADS,
    SLOTS,
    STEPS,
    VALUE_WIDTH,
    WIDTH,
    LatentPool,
    Pool,
    Requests,
    layer_of,
)
from harness import GlooGroup, run_ranks
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms.kv_move import Move
from sglang_shift.platforms.shards import TokenShards
from sglang_shift.platforms.token_shards import TokenShardedBackend


def backend_of(requests, layer, group, dtype=torch.float32, pool_class=Pool):
    pool = pool_class(SLOTS // group.world_size, layer.tp_k_head_num, dtype)
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=requests.table), token_to_kv_pool=pool
    )
    return TokenShardedBackend(runner, TokenShards(group))


def worst_error(
    rank, world, kv_heads, shards, *, sinks=None, cap=0.0, dtype=torch.float32, shared=0, padding=0, latents=""
):
    """Run all steps on this rank. Return the largest error of an output, and what moved."""
    group = GlooGroup.mine([list(range(start, start + shards)) for start in range(0, world, shards)])
    requests = Requests(kv_heads, shards, shared, bool(latents))
    per_rank, kv_head = HEADS // world, rank * kv_heads // world
    heads = slice(rank * per_rank, (rank + 1) * per_rank)
    layer = layer_of(per_rank, logit_cap=cap)
    backend = backend_of(requests, layer, group, dtype, LatentPool if latents else Pool)
    worst = torch.zeros(())
    for prefixes, news in STEPS:
        decode = max(news) == 1
        extra = 0 if decode else padding
        batch, (q, k, v) = requests.batch(prefixes, news, ForwardMode.DECODE if decode else ForwardMode.EXTEND, extra)
        own = [x[:, [kv_head]] for x in (k, v)]
        backend.init_forward_metadata(batch)
        kwargs = {} if sinks is None else {"sinks": sinks[heads]}
        q = q[:, heads]
        if latents == "in two parts":
            kwargs |= {"q_rope": q[..., VALUE_WIDTH:], "k_rope": own[0][..., VALUE_WIDTH:]}
            q, own[0] = q[..., :VALUE_WIDTH], own[0][..., :VALUE_WIDTH]
        output = backend.forward(q.flatten(1), *own, layer, batch, **kwargs)
        output = output.view(-1, per_rank, VALUE_WIDTH)
        assert (output[output.shape[0] - extra :] == 0).all()
        expected = requests.expected(prefixes, news, heads, kv_head, sinks, cap)
        error = (output[: expected.shape[0]] - expected).abs().max()
        worst = torch.maximum(worst, error.nan_to_num(torch.inf))
    return worst.item(), backend.moves


def check_all_steps(rank, world, kv_heads, shards, options, tolerance):
    worst, moves = worst_error(rank, world, kv_heads, shards, **options)
    assert worst < tolerance
    assert moves[Move.QUERIES] > 0 and moves[Move.KEYS] > 0, "both moves are needed"


@pytest.mark.parametrize(("world", "kv_heads", "shards"), [(2, 1, 2), (4, 2, 2), (4, 1, 2), (4, 1, 4), (8, 2, 4)])
def test_outputs_are_those_of_one_rank(world, kv_heads, shards):
    run_ranks(world, check_all_steps, kv_heads, shards, {}, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"sinks": torch.linspace(-2, 2, HEADS)}, {"cap": 1.5}, {"shared": 64}, {"padding": 3}],
    ids=["sinks", "cap", "shared prefix", "rows that fill up"],
)
def test_what_layers_and_batches_may_have(options):
    run_ranks(2, check_all_steps, 1, 2, options, 1e-5)


@pytest.mark.parametrize(("world", "shards"), [(2, 2), (4, 2), (4, 4), (8, 8)])
def test_latents(world, shards):
    """All ranks hold the same latents, so all of them can divide the tokens."""
    run_ranks(world, check_all_steps, 1, shards, {"latents": "whole"}, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"latents": "in two parts"}, {"latents": "whole", "shared": 64}, {"latents": "whole", "padding": 3}],
    ids=["in two parts", "shared prefix", "rows that fill up"],
)
def test_what_batches_of_latents_may_have(options):
    run_ranks(2, check_all_steps, 1, 2, options, 1e-5)


def test_an_fp8_cache_of_latents():
    run_ranks(2, check_all_steps, 1, 2, {"latents": "whole", "dtype": torch.float8_e4m3fn}, 0.2)


def check_latents_move_once(rank, world):
    """A cached token takes its latent and no value beside it."""
    group = GlooGroup.mine([list(range(world))])
    layer = layer_of(HEADS // world)
    bytes_of = [
        backend_of(Requests(1, world), layer, group, pool_class=pool_class)._rule(torch.zeros(1, 4, WIDTH), layer)
        for pool_class in (LatentPool, Pool)
    ]
    assert [rule.key_bytes for rule in bytes_of] == [4 * WIDTH, 4 * (WIDTH + VALUE_WIDTH)]


def test_latents_move_without_values():
    run_ranks(2, check_latents_move_once)


def test_an_fp8_cache():
    """Keys of 8 bits cross as they are stored. The error is that of their rounding."""
    run_ranks(2, check_all_steps, 1, 2, {"dtype": torch.float8_e4m3fn}, 0.2)


def check_wrong_heads(rank, world):
    worst, _ = worst_error(rank, world, 2, 2)
    assert worst > 0.1


def test_ranks_with_different_kv_heads_give_wrong_outputs():
    """The reason for the refusal of such a D: nothing fails, and no output is right."""
    run_ranks(2, check_wrong_heads)


def check_stored_once(rank, world):
    group = GlooGroup.mine([list(range(world))])
    requests, layer = Requests(1, world), layer_of(4)
    backend = backend_of(requests, layer, group)
    batch, (q, k, v) = requests.batch(*STEPS[0], ForwardMode.EXTEND)
    backend.init_forward_metadata(batch)
    backend.forward(q[:, :4].flatten(1), k, v, layer, batch)
    written = int((~backend.token_to_kv_pool.keys.isnan()).all(-1).sum())
    assert written == sum((n - rank + world - 1) // world for n in STEPS[0][1])
    counts = torch.tensor([written])
    group.all_reduce(counts)
    assert counts.item() == sum(STEPS[0][1])


def test_each_token_is_stored_on_one_rank():
    run_ranks(4, check_stored_once)


def check_bytes(rank, world):
    """Bytes of one element do not fit every rank's rows of another type without padding: they still arrive whole."""
    shards = TokenShards(GlooGroup.mine([list(range(world))]))
    prefixes = [1, 2, 7]
    everything = torch.arange(sum(prefixes), dtype=torch.bfloat16).view(-1, 1, 1).repeat(1, 1, 3)
    own = [each[rank::world] for each in everything.split(prefixes)]
    own_values = [each[..., :1].float() for each in own]
    whole = shards.whole_prefixes([torch.cat(own), torch.cat(own_values)], prefixes)
    alone = shards.whole_prefixes([torch.cat(own)], prefixes)
    for (key, value), (same,), expected in zip(whole, alone, everything.split(prefixes), strict=True):
        assert key.dtype is torch.bfloat16 and torch.equal(key, expected) and torch.equal(same, expected)
        assert value.dtype is torch.float32 and torch.equal(value, expected[..., :1].float())


@pytest.mark.parametrize("world", [2, 3])
def test_prefixes_arrive_in_order(world):
    run_ranks(world, check_bytes)


@pytest.mark.parametrize(
    ("layer", "keys", "reason"),
    [
        ({"sliding_window_size": 8}, True, "has a sliding window"),
        ({"is_cross_attention": True}, True, "reads the keys of an encoder"),
        ({}, False, "writes no keys of its own"),
    ],
)
@pytest.mark.parametrize("method", ["extend", "decode"])
def test_layers_that_are_refused(layer, keys, reason, method):
    group = SimpleNamespace(world_size=2, rank_in_group=0)
    refused = layer_of(4, **layer)
    backend = backend_of(Requests(1, 2), refused, group)
    k, v = (torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, VALUE_WIDTH)) if keys else (None, None)
    with pytest.raises(NotImplementedError, match=f"{reason}; serve this model without --dcp-size"):
        getattr(backend, method)(torch.zeros(1, 4 * WIDTH), k, v, refused, None)
