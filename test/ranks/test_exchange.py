"""The exchange against its definition, in parts too, and the base weights against their closed form, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import GlooGroup, run_ranks
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang_shift.layers.linear import OutputProjection, QkvProjection
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange import gloo
from sglang_shift.parallel.exchange.base import ExchangeCounter, ExchangeVolume
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.exchange.gloo import MAX_PARTS, PART_BYTES, GlooExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.region import scatter_tokens
from sglang_shift.parallel.step import Step
from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.base_weights import BaseLinearMethod, BaseWeight, _gather_base, _gather_into, loading_for
from sglang_shift_kernels import reference


class CountingGroup(GlooGroup):
    """Counts the bytes that leave this rank, in all-to-alls and in single messages."""

    sent = 0

    def all_to_all_single(self, output, input):
        self.sent += input.nbytes * (self.world_size - 1) // self.world_size
        super().all_to_all_single(output, input)


def my_group(groups: list[list[int]]) -> CountingGroup:
    plain = GlooGroup.mine(groups)
    group = CountingGroup(plain.ranks, plain.group)
    group.device_group = plain.group
    send = torch.distributed.isend

    def isend(tensor, *args, **kwargs):
        group.sent += tensor.nbytes
        return send(tensor, *args, **kwargs)

    gloo.dist = SimpleNamespace(isend=isend, irecv=torch.distributed.irecv)
    return group


def unchanged(rows: torch.Tensor) -> torch.Tensor:
    return rows


def check_exchange(rank: int, world: int, dtype: torch.dtype) -> None:
    group = my_group([list(range(world))])
    for exchange in (CollectiveExchange(group), GlooExchange(group)):
        check_one_exchange(exchange, rank, world, dtype)


def check_one_exchange(exchange, rank: int, world: int, dtype: torch.dtype) -> None:
    before, sent = exchange.group.sent, 0
    for tokens, width in ((1, 1), (3, 5), (7, 16), (64, 3)):
        # [tokens of all ranks, column blocks of all ranks, width]; every rank knows the whole.
        whole = torch.arange(world * tokens * world * width).view(world * tokens, world, width).to(dtype)
        mine = slice(rank * tokens, (rank + 1) * tokens)
        local_tokens = whole[mine].reshape(tokens, world * width)
        my_heads = whole[:, rank].contiguous()
        assert torch.equal(exchange.scatter_heads(local_tokens, unchanged, world * width), my_heads)
        assert torch.equal(exchange.gather_heads(my_heads, unchanged), local_tokens)
        sent += 2 * tokens * (world - 1) * width * dtype.itemsize
    assert exchange.group.sent - before == sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_exchange_over_gloo(world, dtype):
    run_ranks(world, check_exchange, dtype)


def check_exchange_in_parts(rank: int, world: int, dtype: torch.dtype) -> None:
    """The smallest possible parts: the same results from as many matmuls as there may be."""
    gloo.PART_BYTES = 1
    check_exchange(rank, world, dtype)
    gloo.MESSAGE_BYTES = 1  # no all-to-all of gloo's own, but where a block is empty
    check_exchange(rank, world, dtype)
    exchange = GlooExchange(my_group([list(range(world))]))
    rows: list[int] = []

    def recording(x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return x

    x = torch.arange(10.0 * world).view(10, world).to(dtype)
    exchange.gather_heads(exchange.scatter_heads(x, recording, world), recording)
    assert rows == [3, 3, 2, 2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3])
def test_exchange_in_parts_over_gloo(world, dtype):
    run_ranks(world, check_exchange_in_parts, dtype)


def check_fp8(rank: int, world: int, dtype: torch.dtype, part_bytes: int) -> None:
    """What arrives is what was sent, quantized and dequantized by the reference: exactly, in one part or in several."""
    gloo.PART_BYTES, gloo.MESSAGE_BYTES = part_bytes, 1
    exchange = GlooExchange(my_group([list(range(world))]), fp8=True)
    assert exchange.text == "collective, fp8"
    sent = 0
    for local, width in ((1, 16), (5, 48), (64, 32)):
        rows = world * local
        whole = torch.randn(rows, world * width, generator=torch.Generator().manual_seed(local)).to(dtype)
        columns = [reference.pack_tokens(x, world, quantize=True) for x in whole.split(width, 1)]
        rounded = torch.cat([reference.unpack_tokens(blocks, dtype) for blocks in columns], 1)
        assert not torch.equal(rounded, whole)
        mine, my_heads = slice(rank * local, (rank + 1) * local), slice(rank * width, (rank + 1) * width)
        heads = exchange.scatter_heads(whole[mine], unchanged, world * width)
        assert heads.dtype is dtype and torch.equal(heads, rounded[:, my_heads])
        tokens = exchange.gather_heads(whole[:, my_heads].contiguous(), unchanged)
        assert tokens.dtype is dtype and torch.equal(tokens, rounded[mine])
        # One token less: the last row is padding.
        tokens = exchange.gather_heads(whole[: rows - 1, my_heads].contiguous(), unchanged)
        rounded[-1] = 0
        assert torch.equal(tokens, rounded[mine])
        volume = ExchangeVolume(world, 1, exchange.row_bytes(width, dtype.itemsize))
        assert volume.bytes_sent(rows - 1) == (world - 1) * local * (width + 16)
        sent += 3 * volume.bytes_sent(rows)
    assert exchange.group.sent == sent
    blocks = torch.randn(world, 3, generator=torch.Generator().manual_seed(rank)).to(dtype)
    others = [torch.randn(world, 3, generator=torch.Generator().manual_seed(r)).to(dtype)[rank] for r in range(world)]
    assert torch.equal(exchange.all_to_all(blocks), torch.stack(others)), "the embedding's is plain"


@pytest.mark.parametrize("part_bytes", [PART_BYTES, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3])
def test_fp8_over_gloo(world, dtype, part_bytes):
    run_ranks(world, check_fp8, dtype, part_bytes)


def test_small_exchanges_have_one_part():
    exchange = GlooExchange(SimpleNamespace(world_size=2))  # type: ignore[arg-type]
    width = PART_BYTES // 64  # elements of 4 bytes, half of which stay
    rows = {n: exchange._parts(n * width * 4) for n in (32, 63, 64, 95, 96, 10**6)}
    assert rows == {32: 1, 63: 1, 64: 2, 95: 2, 96: 3, 10**6: MAX_PARTS}


def test_exchanges_are_counted_by_steps():
    """Llama-like: 3 layers, a rank has 32 columns of Q, K and V and 16 of O, in bfloat16."""
    counter = ExchangeCounter(ExchangeVolume(sp_size=4, calls=6, token_bytes=3 * (32 + 16) * 2))
    counter.count(8)
    assert (counter.calls, counter.bytes_sent) == (6, 3 * 2 * 288)
    counter.count(9)  # the last rank's two last rows are padding
    assert (counter.calls, counter.bytes_sent) == (12, 3 * (2 + 3) * 288)


def check_projections(rank: int, world: int, sp: int, tokens: int) -> None:
    """QKV and O around an "attention" that doubles, in parts and not, against the whole model's."""
    layout = RankLayout(world, sp)
    group = my_group(layout.sp_groups())
    base_group = GlooGroup.mine(layout.base_tp_groups()) if world > sp else None
    generator = torch.Generator().manual_seed(0)
    hidden, block = 16, 5  # a shard's QKV and O have as many columns
    weights = (
        torch.randn(world, block, hidden, generator=generator),
        torch.randn(world, hidden, block, generator=generator),
    )
    biases = torch.randn(world, block, generator=generator), torch.randn(hidden, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    heads = torch.stack([F.linear(x, w, b) for w, b in zip(weights[0], biases[0], strict=True)])
    expected = sum(F.linear(2 * h, w) for h, w in zip(heads, weights[1], strict=True)) + biases[1]
    linear = SimpleNamespace(
        skip_bias_add=False,
        quant_method=SimpleNamespace(apply=lambda base, x, bias: F.linear(x, base.weight, bias)),
    )
    members = layout.sp_groups()[layout.base_tp_index(rank)]
    for gloo.PART_BYTES in (1 << 30, 64):
        topology = Topology(layout, rank, group, base_group, GlooExchange(group))  # type: ignore[arg-type]
        qkv_base = BaseWeight(linear, topology, weights[0][members].flatten(0, 1), biases[0][members].flatten())
        o_base = BaseWeight(linear, topology, torch.cat(list(weights[1][members]), 1), biases[1])
        step, before = Step(Mode.SP, topology, None, has_exit=False), group.sent
        local = scatter_tokens(step, x)
        assert not step.in_attention
        my_heads = QkvProjection(linear, qkv_base).forward(local, step)
        assert torch.allclose(my_heads, heads[rank], atol=1e-5) and step.in_attention
        y = OutputProjection(linear, o_base).forward(2 * my_heads, step)
        assert not step.in_attention, "from here on, rows are complete"
        mine = slice(layout.sp_index(rank) * len(local), min(tokens, (layout.sp_index(rank) + 1) * len(local)))
        assert torch.allclose(y[: len(expected[mine])], expected[mine], atol=1e-4)
        assert group.sent - before == ExchangeVolume(sp, 2, 2 * block * 4).bytes_sent(tokens)


@pytest.mark.parametrize("tokens", [1, 2, 37, 64])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
def test_projections_around_the_exchange(world, sp, tokens):
    run_ranks(world, check_projections, sp, tokens)


class Recording(GlooGroup):
    """Keeps what it gathered into."""

    def __init__(self, *args):
        super().__init__(*args)
        self.outputs: list[torch.Tensor] = []

    def all_gather_into_tensor(self, output, input):
        self.outputs.append(output)
        super().all_gather_into_tensor(output, input)


def check_assembly(rank: int, world: int, sp: int) -> None:
    layout = RankLayout(world, sp)
    plain = GlooGroup.mine(layout.sp_groups())
    group = Recording(plain.ranks, plain.group)
    topology = Topology(layout, rank, group, None, CollectiveExchange(group))  # type: ignore[arg-type]
    members = layout.sp_groups()[layout.base_tp_index(rank)]

    def shard_of(r: int, offset: float = 0.0) -> torch.Tensor:
        return torch.arange(32.0).view(8, 4) + 100 * r + offset

    for dim in (0, 1):
        group.outputs.clear()
        param = torch.nn.Parameter(shard_of(rank), requires_grad=False)
        base = _gather_base(param, topology, dim)
        assert torch.equal(base, torch.cat([shard_of(r) for r in members], dim))
        assert torch.equal(param.data, shard_of(rank))
        beside = [output.numel() for output in group.outputs if output.data_ptr() != base.data_ptr()]
        assert all(n <= param.numel() for n in beside), "beside the base weight, no more memory than a shard"
        assert param.data.untyped_storage().data_ptr() == base.untyped_storage().data_ptr(), "the shard is a view"
        # A weight update writes this rank's shard in place; the others' parts follow by gathering again.
        param.data.copy_(shard_of(rank, 0.5))
        _gather_into(base, param.data, topology, dim)
        assert torch.equal(base, torch.cat([shard_of(r, 0.5) for r in members], dim))
        assert torch.equal(param.data, shard_of(rank, 0.5))


@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
def test_base_weights_over_gloo(world, sp):
    run_ranks(world, check_assembly, sp)


def test_one_rank_needs_no_exchange():
    group = SimpleNamespace(world_size=1, rank_in_group=0, all_to_all_single=lambda output, input: output.copy_(input))
    for exchange in (CollectiveExchange(group), GlooExchange(group)):
        x = torch.randn(5, 8)
        assert torch.equal(exchange.gather_heads(exchange.scatter_heads(x, unchanged, 8), unchanged), x)
    assert ExchangeVolume(1, 2, 8 * 4).bytes_sent(5) == 0


def test_a_weight_is_created_as_a_view_of_its_base_weight():
    layout = RankLayout(4, 2)
    topology = Topology(layout, 2, None, None, None)  # type: ignore[arg-type]
    for kind, shape in ((ColumnParallelLinear, (6, 5)), (RowParallelLinear, (3, 10))):
        layer = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        with loading_for(topology):
            BaseLinearMethod().create_weights(layer, 5, [3], 5, 3, torch.bfloat16, weight_loader=len)
        weight = layer.weight
        assert weight.shape == (3, 5) and weight.weight_loader is len and not weight.requires_grad
        assert weight.shift_base.shape == shape and weight.shift_base.dtype == torch.bfloat16
        mine = weight.shift_base[3:] if kind is ColumnParallelLinear else weight.shift_base[:, 5:]
        weight.data.copy_(torch.arange(15.0).view(3, 5))
        assert torch.equal(mine, weight.data), "rank 2 of 4 is the second of its SP group"
    replicated = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(replicated)
    with loading_for(topology):
        BaseLinearMethod().create_weights(replicated, 5, [3], 5, 3, torch.bfloat16)
    assert not hasattr(replicated.weight, "shift_base")
