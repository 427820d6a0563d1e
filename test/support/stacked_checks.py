"""Compares stacked shards with tensor parallelism, in the ranks of one gloo group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import GlooGroup
from quantized_kernels import install
from quantized_layers import EXPERTS, SIZES, TOP_K, build_experts, dense
from sglang.benchmark import one_batch
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang_shift.models.demo import demo_model_path
from sglang_shift.parallel.exchange.gloo import GlooExchange
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.parallel.topology import Topology
from sglang_shift.tools.gpu_check.formats import KINDS, Format, build, checkpoint, inputs, load, tensor_parallel
from sglang_shift.weights.stacked import StackedShards, stack_shards

ROWS = 13  # odd: the last rank has a row that pads the step


@dataclass
class Figures:
    """What one rank found for a linear.

    Attributes:
        difference: The largest difference between SP and TP: of the columns, or of the sum over an SP group.
        whole: The same for the sum over all ranks.
        of_bound: The largest part of its bound that a difference of the whole sum takes.
        error: TP's distance from the float product with the checkpoint, relative to the length of the product.
        text: How SP multiplies.
    """

    difference: float
    whole: float
    of_bound: float
    error: float
    text: str


def topology_of(rank: int, world: int, sp: int) -> Topology:
    layout = RankLayout(world, sp)
    group = GlooGroup.mine(layout.sp_groups())
    base = GlooGroup.mine(layout.base_tp_groups()) if world > sp else None
    return Topology(layout, rank, group, base, GlooExchange(group))  # type: ignore[arg-type]


def all_ranks(x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all ranks, by rank."""
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.contiguous())
    return out


def my_rows(x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """This rank's rows of a step, with padding."""
    size = topology.layout.sp_size
    width = padded_local_tokens(len(x), size)
    return F.pad(x, (0, 0, 0, width * size - len(x)))[topology.sp_index * width :][:width].contiguous()


def without_padding(mine: torch.Tensor, rows: int, topology: Topology) -> torch.Tensor:
    return mine[: max(0, rows - topology.sp_index * len(mine))]


def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, bias)


def linear(kind: str, fmt: Format, topology: Topology, seed: int = 0) -> Any:
    """One of SGLang's linears, loaded and processed."""
    with tensor_parallel(topology.rank, topology.layout.world_size):
        layer = build(kind, fmt, SIZES)
        load(layer, checkpoint(kind, fmt, SIZES, seed))
    return layer


def columns_of_tp(layer: Any, x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """What the ranks of this rank's SP group compute in TP, side by side."""
    outputs = all_ranks(apply(layer, x, layer.bias))
    return torch.cat([outputs[rank] for rank in topology.sp_group.ranks], dim=-1)


def compare_columns(layer: Any, stacked: StackedShards, x: torch.Tensor) -> float:
    topology = stacked.topology
    expected = my_rows(columns_of_tp(layer, x, topology), topology)
    difference = without_padding(stacked.columns(my_rows(x, topology)) - expected, len(x), topology)
    return difference.abs().max().item()


def compare_rows(layer: Any, stacked: StackedShards, x: torch.Tensor) -> tuple[float, float, float]:
    """The differences of the sum over the SP group and of the whole sum, and the latter's part of its bound.

    A sum of four numbers depends on the order. Each of its additions rounds, by at most half a unit in the last place
    of a partial sum. TP adds three times, and SP three times in another order.
    """
    topology, width = stacked.topology, layer.input_size_per_partition
    parts = all_ranks(apply(layer, x[:, topology.rank * width :][:, :width].contiguous(),
                            layer.bias if topology.rank == 0 else None))  # fmt: skip
    members = topology.sp_group.ranks
    side_by_side = torch.cat([x[:, rank * width :][:, :width] for rank in members], dim=-1)
    got = stacked.rows(my_rows(side_by_side, topology), add_bias=topology.adds_row_bias)
    of_group = my_rows(sum(parts[rank] for rank in members), topology)
    whole = topology.base_all_reduce(got.clone())
    of_all = my_rows(sum(parts), topology)
    bound = 6 * torch.finfo(x.dtype).eps / 2 * my_rows(sum(part.double().abs() for part in parts), topology)
    partial, total = (without_padding(d, len(x), topology).double().abs() for d in (got - of_group, whole - of_all))
    part_of_bound = total / without_padding(bound, len(x), topology).clamp(min=1e-30)
    return partial.max().item(), total.max().item(), part_of_bound.max().item()


def error_of_tp(kind: str, fmt: Format, layer: Any, x: torch.Tensor, topology: Topology) -> float:
    """How far TP is from the float product of the inputs with the checkpoint's weights."""
    weights = [(dense(t), t["bias"]) for t in checkpoint(kind, fmt, SIZES).values()]
    rank, world = topology.rank, topology.layout.world_size
    if kind == "down":
        (weight, bias), width = weights[0], layer.input_size_per_partition
        mine = x[:, rank * width :][:, :width].contiguous()
        got = sum(all_ranks(apply(layer, mine, layer.bias if rank == 0 else None).double()))
    else:
        weight = torch.cat([w.chunk(world)[rank] for w, _ in weights])
        bias = torch.cat([b.chunk(world)[rank] for _, b in weights])
        got = apply(layer, x, layer.bias).double()
    expected = x.double() @ weight.t() + bias
    return ((got - expected).norm() / expected.norm()).item()


def figures(rank: int, world: int, sp: int, fmt: Format) -> dict[str, Figures]:
    """Compare SP with TP in each kind of linear."""
    install(fmt.capability)
    topology = topology_of(rank, world, sp)
    found = {}
    for kind in KINDS:
        layer = linear(kind, fmt, topology)
        x = inputs(ROWS, layer.input_size, fmt)
        error = error_of_tp(kind, fmt, layer, x, topology)
        stacked = stack_shards(layer, topology, kind)
        if kind == "down":
            found[kind] = Figures(*compare_rows(layer, stacked, x), error, stacked.text)
        else:
            found[kind] = Figures(compare_columns(layer, stacked, x), 0.0, 0.0, error, stacked.text)
    return found


def publish_settings(rank: int, world: int) -> None:
    """Publish SGLang's settings of a server with P ranks, from which its experts read their place."""
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    settings = ServerArgs(model_path=str(demo_model_path()), tp_size=world, device="cpu", load_format="dummy")
    settings.resolve_once()
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    one_batch._init_process_global_configs()
    get_parallel().override_permanently(tp_group=GlooGroup.mine([list(range(world))]))


def choices(rows: int) -> StandardTopKOutput:
    """Random experts of each row, with their weights."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, EXPERTS, generator=generator)
    weights, experts = logits.softmax(-1).topk(TOP_K)
    return StandardTopKOutput(weights, experts.to(torch.int32), logits)


def experts_figure(rank: int, world: int, sp: int, fmt: Format) -> float:
    """The largest difference of experts that every rank holds whole, relative to the largest output of TP."""
    install(fmt.capability)
    publish_settings(rank, world)
    topology = topology_of(rank, world, sp)
    layer = build_experts(fmt)
    rows = ROWS + 1  # no padding: a row that SGLang routes never has the same expert twice
    x, chosen = inputs(rows, SIZES.hidden, fmt), choices(rows)
    parts = all_ranks(layer(x.clone(), chosen))
    expected = my_rows(sum(parts[member] for member in topology.sp_group.ranks), topology)
    stacked = stack_shards(layer, topology, "experts")
    mine = StandardTopKOutput(*(my_rows(part, topology) for part in chosen))
    got = sum(stacked.each_shard(lambda: layer(my_rows(x, topology), mine)))
    return ((got - expected).abs().max() / expected.abs().max()).item()
