"""The exchange against its definition, and the base weights against their closed form, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from harness import GlooGroup, run_ranks
from sglang_shift.exchange import SequenceExchange
from sglang_shift.layout import RankLayout
from sglang_shift.parallel import SequenceParallel
from sglang_shift.weights import _gather_into, _grown


def check_exchange(rank: int, world: int, dtype: torch.dtype) -> None:
    exchange = SequenceExchange(GlooGroup.mine([list(range(world))]))
    sent = 0
    for tokens, width in ((1, 1), (3, 5), (7, 16), (64, 3)):
        # [tokens of all ranks, column blocks of all ranks, width]; every rank knows the whole.
        whole = torch.arange(world * tokens * world * width).view(world * tokens, world, width).to(dtype)
        mine = slice(rank * tokens, (rank + 1) * tokens)
        local_tokens = whole[mine].reshape(tokens, world * width)
        my_heads = whole[:, rank].contiguous()
        assert torch.equal(exchange.scatter_heads(local_tokens), my_heads)
        assert torch.equal(exchange.gather_heads(my_heads), local_tokens)
        sent += 2 * tokens * (world - 1) * width * dtype.itemsize
    assert exchange.bytes_sent == sent
    assert exchange.calls == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_exchange_over_gloo(world, dtype):
    run_ranks(world, check_exchange, dtype)


def check_assembly(rank: int, world: int, sp: int) -> None:
    layout = RankLayout(world, sp)
    group = GlooGroup.mine(layout.sp_groups())
    parallel = SequenceParallel(layout, rank, group, None, SequenceExchange(group))  # type: ignore[arg-type]
    members = layout.sp_groups()[layout.base_tp_index(rank)]

    def shard_of(r: int, offset: float = 0.0) -> torch.Tensor:
        return torch.arange(12.0).view(3, 4) + 100 * r + offset

    for dim in (0, 1):
        param = torch.nn.Parameter(shard_of(rank), requires_grad=False)
        base = _grown(param, parallel, dim)
        assert torch.equal(base, torch.cat([shard_of(r) for r in members], dim))
        assert torch.equal(param.data, shard_of(rank))
        assert param.data.untyped_storage().data_ptr() == base.untyped_storage().data_ptr(), "the shard is a view"
        # A weight update writes this rank's shard in place; the others' parts follow by gathering again.
        param.data.copy_(shard_of(rank, 0.5))
        _gather_into(base, param.data, parallel, dim)
        assert torch.equal(base, torch.cat([shard_of(r, 0.5) for r in members], dim))
        assert torch.equal(param.data, shard_of(rank, 0.5))


@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
def test_base_weights_over_gloo(world, sp):
    run_ranks(world, check_assembly, sp)


def test_one_rank_needs_no_exchange():
    group = SimpleNamespace(world_size=1, rank_in_group=0, all_to_all_single=lambda output, input: output.copy_(input))
    exchange = SequenceExchange(group)
    x = torch.randn(5, 8)
    assert torch.equal(exchange.gather_heads(exchange.scatter_heads(x)), x)
    assert exchange.bytes_sent == 0
