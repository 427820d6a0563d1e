"""Our FlashAttention 3 backend over KV caches that ranks divide by token, with plain attention in place of the kernel.

The outputs must be those of one rank that has all keys. Decisions and bytes must be those of the CPU's backend.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from divided_requests import HEADS, SLOTS, STEPS, VALUE_WIDTH, WIDTH, Pool, Requests, layer_of
from harness import GlooGroup, run_ranks
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.platforms.fa3_shards import Fa3ShardedBackend
from sglang_shift.platforms.kv_move import Move
from sglang_shift.platforms.shards import TokenShards
from sglang_shift.platforms.token_shards import TokenShardedBackend
from torch_attention import TorchKernels


class OtherOwner(TokenShards):
    """A wrong rule: a rank stores the tokens of its neighbour."""

    def owned(self, slots):
        return slots % self.count == (self.rank + 1) % self.count


def runner_of(requests, layer, group, page_size=1):
    pool = Pool(SLOTS // group.world_size, layer.tp_k_head_num, torch.float32)
    return SimpleNamespace(
        device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=requests.table.int()), token_to_kv_pool=pool,
        page_size=page_size,
    )  # fmt: skip


class Trial:
    """This rank's part of the requests, and its backends."""

    def __init__(self, rank, world, kv_heads, shards, *, cap=0.0, shared=0, page_size=1, rule=TokenShards):
        self.group = GlooGroup.mine([list(range(start, start + shards)) for start in range(0, world, shards)])
        self.requests = Requests(kv_heads, shards, shared, page_size=page_size)
        self.per_rank, self.kv_head = HEADS // world, rank * kv_heads // world
        self.heads = slice(rank * self.per_rank, (rank + 1) * self.per_rank)
        self.layer, self.cap = layer_of(self.per_rank, logit_cap=cap), cap
        runner = runner_of(self.requests, self.layer, self.group, page_size)
        self.backend = Fa3ShardedBackend(runner, rule(self.group), TorchKernels())

    def step(self, prefixes, news, padding=0):
        """A batch and this rank's queries, keys and values."""
        mode = ForwardMode.DECODE if max(news) == 1 else ForwardMode.EXTEND
        batch, (q, k, v) = self.requests.batch(prefixes, news, mode, padding)
        return batch, q[:, self.heads].flatten(1), k[:, [self.kv_head]], v[:, [self.kv_head]]

    def error(self, output, prefixes, news):
        expected = self.requests.expected(prefixes, news, self.heads, self.kv_head, None, self.cap)
        output = output.view(-1, self.per_rank, VALUE_WIDTH)
        assert (output[expected.shape[0] :] == 0).all()
        return (output[: expected.shape[0]] - expected).abs().max().nan_to_num(torch.inf).item()

    def worst(self, padding=0):
        """The largest error over all steps."""
        errors = []
        for prefixes, news in STEPS:
            batch, q, k, v = self.step(prefixes, news, padding if max(news) > 1 else 0)
            self.backend.init_forward_metadata(batch)
            errors.append(self.error(self.backend.forward(q, k, v, self.layer, batch), prefixes, news))
        return max(errors)


def check_all_steps(rank, world, kv_heads, shards, options, padding):
    trial = Trial(rank, world, kv_heads, shards, **options)
    assert trial.worst(padding) < 1e-5
    assert trial.backend.moves[Move.QUERIES] > 0 and trial.backend.moves[Move.KEYS] > 0, "both moves are needed"


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(("world", "kv_heads", "shards"), [(2, 1, 2), (4, 2, 2), (4, 1, 4)])
def test_outputs_are_those_of_one_rank(world, kv_heads, shards, page_size):
    """With D = 4, ranks have no token of the shortest requests."""
    run_ranks(world, check_all_steps, kv_heads, shards, {"page_size": page_size}, 0)


@pytest.mark.parametrize(
    ("options", "padding"),
    [({"cap": 1.5}, 0), ({"shared": 64, "page_size": 4}, 0), ({}, 3)],
    ids=["cap", "shared prefix", "rows that fill up"],
)
def test_what_layers_and_batches_may_have(options, padding):
    run_ranks(2, check_all_steps, 1, 2, options, padding)


def check_wrong_rule(rank, world):
    assert Trial(rank, world, 1, 2, rule=OtherOwner).worst() > 0.1


def test_another_owner_gives_wrong_outputs():
    run_ranks(2, check_wrong_rule)


def check_like_the_cpu(rank, world):
    """Both backends write the same rows, and move the same."""
    trial = Trial(rank, world, 1, world)
    runner = runner_of(trial.requests, trial.layer, trial.group)
    other = TokenShardedBackend(runner, TokenShards(trial.group))
    for step in STEPS:
        batch, q, k, v = trial.step(*step)
        outputs = []
        for backend in (trial.backend, other):
            backend.init_forward_metadata(batch)
            outputs.append(backend.forward(q, k, v, trial.layer, batch))
        assert torch.allclose(*outputs, atol=1e-5)
    assert trial.backend.moves == other.moves
    ours, theirs = (pool.keys.clone() for pool in (trial.backend.token_to_kv_pool, runner.token_to_kv_pool))
    ours[0] = theirs[0]  # no request has this row
    assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))
    assert not ours.isnan().all()


@pytest.mark.parametrize("world", [2, 4])
def test_it_stores_and_moves_what_the_backend_of_cpus_does(world):
    run_ranks(world, check_like_the_cpu)


def check_graphs(rank, world, page_size):
    """A replay runs no Python of a layer. It reads the tensors that the capture has read, which a step has filled."""
    trial = Trial(rank, world, 1, world, page_size=page_size)
    backend, layer = trial.backend, trial.layer
    batch, q, k, v = trial.step(*STEPS[0])
    backend.init_forward_metadata(batch)
    backend.forward(q, k, v, layer, batch)
    backend.init_cuda_graph_state(max_bs=6, max_num_tokens=6)
    fill = backend.get_cuda_graph_seq_len_fill_value()
    slots = torch.zeros(6, dtype=torch.int64)
    blank = SimpleNamespace(
        forward_mode=ForwardMode.DECODE, batch_size=6, seq_lens=torch.full((6,), fill), seq_lens_cpu=None,
        req_pool_indices=torch.zeros(6, dtype=torch.int64), out_cache_loc=slots,
    )  # fmt: skip
    backend.init_forward_metadata_out_graph(blank, in_capture=True)
    captured = backend.decode
    smaller = SimpleNamespace(**{**vars(blank), "batch_size": 2})
    backend.init_forward_metadata_out_graph(smaller, in_capture=True)  # another graph
    for prefixes, news in (STEPS[1], ([2, 3, 66, 131], [1, 1, 1, 1])):
        batch, q, k, v = trial.step(prefixes, news)
        slots.zero_()[:4] = batch.out_cache_loc
        padded = [torch.cat([x, x.new_zeros(2, *x.shape[1:])]) for x in (q, k, v)]
        lengths = torch.cat([batch.seq_lens, torch.full((2,), fill)])
        rows = torch.cat([batch.req_pool_indices, torch.zeros(2, dtype=torch.int64)])
        view = SimpleNamespace(
            forward_mode=ForwardMode.DECODE, batch_size=6, seq_lens=lengths, seq_lens_cpu=lengths,
            req_pool_indices=rows, out_cache_loc=batch.out_cache_loc,
        )  # fmt: skip
        backend.init_forward_metadata_out_graph(view)
        backend.decode = captured
        backend.init_forward_metadata_in_graph(blank)
        output = backend.forward_decode(*padded, layer, blank)
        assert trial.error(output[:4], prefixes, news) < 1e-5


@pytest.mark.parametrize("page_size", [1, 4])
def test_graphs_of_decodes(page_size):
    run_ranks(2, check_graphs, page_size)


@pytest.mark.parametrize(
    ("layer", "keys", "others", "reason"),
    [
        ({"sliding_window_size": 8}, True, {}, "has a sliding window; serve this model without --dcp-size"),
        ({"is_cross_attention": True}, True, {}, "reads the keys of an encoder; serve this model without --dcp-size"),
        ({}, False, {}, "writes no keys of its own; serve this model without --dcp-size"),
        ({}, True, {"sinks": torch.zeros(4)}, "needs sinks, which --attention-backend fa3 does not have"),
    ],
)
@pytest.mark.parametrize("method", ["forward_extend", "forward_decode"])
def test_layers_that_are_refused(layer, keys, others, reason, method):
    group = SimpleNamespace(world_size=2, rank_in_group=0)
    refused = layer_of(4, **layer)
    backend = Fa3ShardedBackend(runner_of(Requests(1, 2), refused, group), TokenShards(group), TorchKernels())
    k, v = (torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, VALUE_WIDTH)) if keys else (None, None)
    with pytest.raises(NotImplementedError, match=reason):
        getattr(backend, method)(torch.zeros(1, 4 * WIDTH), k, v, refused, None, **others)
