"""Stacked shards of SGLang's layers, in every format of quantized weights: SP computes what TP computes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import GlooGroup, run_ranks
from quantized_kernels import install
from quantized_layers import FORMATS, Format, build, inputs, load, tensor_parallel
from sglang_shift.parallel.exchange.gloo import GlooExchange
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.parallel.topology import Topology
from sglang_shift.weights.stacked import StackedShards, stack_shards

ROWS = 13  # odd: the last rank has rows that pad the step
LAYOUTS = [(2, 2), (4, 2)]


def topology_of(rank: int, world: int, sp: int) -> Topology:
    layout = RankLayout(world, sp)
    group = GlooGroup.mine(layout.sp_groups())
    base = GlooGroup.mine(layout.base_tp_groups()) if world > sp else None
    return Topology(layout, rank, group, base, GlooExchange(group))  # type: ignore[arg-type]


def all_ranks(x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, by rank."""
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return out


def rows_of(x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """This rank's rows of a step."""
    size = topology.layout.sp_size
    width = padded_local_tokens(len(x), size)
    return F.pad(x, (0, 0, 0, width * size - len(x)))[topology.sp_index * width :][:width].contiguous()


def apply(layer, x, bias):
    return layer.quant_method.apply(layer, x, bias)


def check_columns(layer, stacked: StackedShards, topology: Topology, x: torch.Tensor) -> float:
    """The largest difference between columns in SP and in TP."""
    outputs = all_ranks(apply(layer, x, layer.bias))
    expected = torch.cat([outputs[r] for r in topology.sp_group.ranks], dim=-1)
    got = stacked.columns(rows_of(x, topology))
    return (got - rows_of(expected, topology))[: len_of(x, topology)].abs().max().item()


def check_rows(layer, stacked: StackedShards, topology: Topology, x: torch.Tensor) -> tuple[float, float]:
    """The largest difference of the sum over an SP group, and of the whole sum."""
    k = layer.input_size_per_partition
    bias = layer.bias if topology.rank == 0 else None
    parts = all_ranks(apply(layer, x[:, topology.rank * k :][:, :k].contiguous(), bias))
    mine = x[:, topology.layout.base_tp_index(topology.rank) * k :]
    members = topology.sp_group.ranks
    mine = torch.cat([x[:, r * k :][:, :k] for r in members], dim=-1)
    got = stacked.rows(rows_of(mine, topology), add_bias=topology.adds_row_bias)
    count = len_of(x, topology)
    of_group = sum((parts[r] for r in members[1:]), parts[members[0]])
    partial = (got - rows_of(of_group, topology))[:count].abs().max().item()
    whole = topology.base_all_reduce(got.clone())
    of_all = sum(parts[1:], parts[0])
    return partial, (whole - rows_of(of_all, topology))[:count].abs().max().item()


def len_of(x: torch.Tensor, topology: Topology) -> int:
    """How many of this rank's rows are no padding."""
    width = padded_local_tokens(len(x), topology.layout.sp_size)
    return max(0, min(width, len(x) - topology.sp_index * width))


def check_format(rank: int, world: int, sp: int, fmt: Format) -> None:
    install(fmt.gpu)
    topology = topology_of(rank, world, sp)
    for kind in ("qkv", "gate_up", "down"):
        with tensor_parallel(rank, world):
            layer = build(kind, fmt.config(), fmt.dtype)
            load(layer, kind, fmt.tensors)
        before = apply(layer, inputs(3, layer.weight_k if False else 1, fmt), None) if False else None
        del before
        stacked = stack_shards(layer, topology, kind)
        if kind == "down":
            partial, whole = check_rows(layer, stacked, topology, inputs(ROWS, layer.input_size, fmt))
            print(rank, kind, partial, whole, stacked.text, flush=True)
        else:
            difference = check_columns(layer, stacked, topology, inputs(ROWS, layer.input_size, fmt))
            print(rank, kind, difference, stacked.text, flush=True)


@pytest.mark.parametrize(("world", "sp"), LAYOUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_sp_computes_what_tp_computes(name, world, sp):
    run_ranks(world, check_format, sp, FORMATS[name])
