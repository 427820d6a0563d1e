"""Checks SGLang's kernels of quantized weights on stacked shards, and times them.

Two ranks of TP are built side by side in one process. Each rank is one of SGLang's linears with its own shard of a
random checkpoint. Then the shards are stacked, as the two ranks of an SP group would stack them. A product with stacked
shards must be what the two linears gave before.

SP never passes a strided weight to these kernels. What they would do with one is noted, because another layout of the
base weights might be possible then.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import ColumnParallelLinear

from sglang_shift.models.demo import demo_model_path
from sglang_shift.parallel.exchange.collective import CollectiveExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.topology import Topology
from sglang_shift.tools.gpu_check.formats import (
    EACH,
    FORMATS,
    KINDS,
    Format,
    Sizes,
    build,
    checkpoint,
    inputs,
    load,
    tensor_parallel,
)
from sglang_shift.tools.gpu_check.gemms import TOLERANCE
from sglang_shift.tools.gpu_check.record import Record, one_line
from sglang_shift.tools.gpu_check.timing import error_of, seconds_of
from sglang_shift.weights.layer_tensors import Shard, describe
from sglang_shift.weights.one_gemm import DTYPES, SCALES
from sglang_shift.weights.stacked import StackedShards, stack_shards

RANKS = 2
ROWS = (1, 16, 512, 4096)
"""Numbers of rows. SGLang has other kernels for few rows than for many."""

NO_KERNEL = (ImportError, NotImplementedError)
"""What is raised if a package is missing, or has no kernel for this GPU. Any other error is a fault."""

LLAMA_8B = Sizes(hidden=4096, head=128, heads=32, kv_heads=8, intermediate=14336)
"""These sizes are from config.json of meta-llama/Llama-3.1-8B."""


class SideBySide:
    """An SP group whose ranks are layers of this process. This process is rank 0."""

    rank_in_group, world_size, device_group = 0, RANKS, None

    def __init__(self, layers: list[Any]) -> None:
        self.ranks = list(range(RANKS))
        self.layers = layers
        self._others: Iterator[tuple[torch.Tensor, ...]] = iter(())

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return the descriptions of all layers. The next gatherings are of their blocks of memory, one by one."""
        described = [describe(layer) for layer in self.layers]
        self._others = iter(list(zip(*(memory for _, _, memory in described[1:]), strict=True)))
        return [obj, *(description for description, _, _ in described[1:])]

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Fill the output with the input and the blocks of the other layers."""
        rows = output.view(RANKS, -1)
        rows[0] = input
        for row, block in zip(rows[1:], next(self._others), strict=True):
            row[: block.numel()] = block


def check(record: Record) -> None:
    """Check each format for which this GPU has a kernel.

    Raises:
        pytest.skip.Exception: there is none.
    """
    publish_settings()
    capability, device = torch.cuda.get_device_capability(), torch.device("cuda")
    for name, fmt in FORMATS.items():
        if capability < fmt.capability:
            record.note(f"{name}: skipped: it needs compute capability {fmt.capability[0]}.{fmt.capability[1]}")
            continue
        try:
            for kind in KINDS:
                check_linear(record, name, kind, LLAMA_8B, device)
        except pytest.skip.Exception as reason:
            record.note(f"{name}: skipped: {reason}")
    checked = dict.fromkeys(row["format"] for row in record.rows)
    record.note(f"checked: {', '.join(checked) or 'nothing'}")
    if not checked and not record.problems:
        pytest.skip("no format was compared: this GPU or this environment has a kernel for none")


def publish_settings() -> None:
    """Publish the settings of a server with two ranks, because SGLang's layers read them."""
    from sglang.benchmark import one_batch
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    settings = ServerArgs(model_path=str(demo_model_path()), tp_size=RANKS, load_format="dummy")
    settings.resolve_once()
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()


def check_linear(
    record: Record, name: str, kind: str, sizes: Sizes, device: torch.device, steps: tuple[int, ...] = ROWS
) -> None:
    """Compare products with stacked shards with those of the ranks in TP, and time both.

    If SGLang itself fails, this is a problem, unless it has no kernel here.

    Raises:
        pytest.skip.Exception: SGLang has no kernel for such weights here.
    """
    fmt = FORMATS[name]
    try:
        with torch.device(device):
            layers = [rank_of_tp(kind, fmt, sizes, rank, str(device)) for rank in range(RANKS)]
        given = {rows: inputs(rows, layers[0].input_size, fmt, str(device)) for rows in steps}
        expected = {rows: product_of_tp(layers, x) for rows, x in given.items()}
    except NO_KERNEL as lack:
        pytest.skip(f"{kind}: SGLang has no kernel here: {one_line(lack)}")
    except Exception as failure:  # each kernel raises its own type of error
        record.problem(f"{name}, {kind}: SGLang itself fails here: {one_line(failure)}")
        return
    note_strided(record, f"{name}, {kind}", layers[0], given[steps[-1]])
    alone = {}
    for rows, x in given.items():
        part = input_of_shard(layers[0], x, 0)
        alone[rows] = seconds_of(partial(product_of_shard, layers[0], part, 0), device)
    group: Any = SideBySide(layers)
    stacked = stack_shards(layers[0], Topology(RankLayout(RANKS, RANKS), 0, group, None, CollectiveExchange(group)))
    gemms = gemms_of(kind, fmt, layers[0])
    if stacked.text != gemms:
        record.problem(f"{name}, {kind}: SP runs {stacked.text} instead of {gemms}")
    for rows, x in given.items():
        label = f"{name}, {kind}, {rows} rows"
        try:
            error = error_of(product_of_sp(stacked, x), expected[rows])
            seconds = seconds_of(partial(product_of_sp, stacked, x), device)
        except Exception as refusal:
            record.problem(f"{label}: {one_line(refusal)}")
            continue
        figures = {"us": round(1e6 * seconds, 2), "us of a shard": round(1e6 * alone[rows], 2)}
        record.row(format=name, linear=kind, rows=rows, gemms=stacked.text, error=error, **figures)
        if not error <= TOLERANCE:
            record.problem(f"{label}: differs by {error:.2g} of its norm ({stacked.text})")


def rank_of_tp(kind: str, fmt: Format, sizes: Sizes, rank: int, device: str) -> Any:
    """Return the linear of a rank, loaded and processed. Ranks load other parts of one checkpoint."""
    with tensor_parallel(rank, RANKS):
        layer = build(kind, fmt, sizes)
        load(layer, checkpoint(kind, fmt, sizes, device=device))
    return layer


def gemms_of(kind: str, fmt: Format, layer: Any) -> str:
    """Return how SP should multiply.

    If SGLang packed the scales, as for DeepGEMM on Blackwell, their rows are not the columns of any shard.
    """
    scales = [getattr(layer, name, None) for name in SCALES]
    packed = any(scale is not None and scale.dtype != torch.float32 for scale in scales)
    return EACH if kind == "down" or packed else fmt.columns


def input_of_shard(layer: Any, x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return what a rank multiplies in TP: the whole input, or its part of it, packed as in a TP step."""
    if isinstance(layer, ColumnParallelLinear):
        return x
    width = layer.input_size_per_partition
    return x[:, rank * width :][:, :width].contiguous()


def product_of_shard(layer: Any, x: torch.Tensor, rank: int) -> torch.Tensor:
    """Return what a rank computes in TP. Rank 0 adds the bias of a row-parallel linear."""
    adds_bias = isinstance(layer, ColumnParallelLinear) or rank == 0
    return layer.quant_method.apply(layer, x, layer.bias if adds_bias else None)


def product_of_tp(layers: list[Any], x: torch.Tensor) -> torch.Tensor:
    """Return the products of all ranks, side by side or added."""
    parts = [product_of_shard(layer, input_of_shard(layer, x, rank), rank) for rank, layer in enumerate(layers)]
    return torch.cat(parts, dim=-1) if isinstance(layers[0], ColumnParallelLinear) else sum(parts[1:], parts[0])


def product_of_sp(stacked: StackedShards, x: torch.Tensor) -> torch.Tensor:
    """Return the product with the stacked shards."""
    return stacked.columns(x) if isinstance(stacked.layer, ColumnParallelLinear) else stacked.rows(x, add_bias=True)


def note_strided(record: Record, label: str, layer: Any, x: torch.Tensor) -> None:
    """Note what the kernel does with a weight whose rows are not adjacent. The layer keeps its weight."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dtype not in DTYPES:
        return  # in packed and repacked weights, a row of memory is no output column
    rows = weight.data if weight.is_contiguous() else weight.data.t()
    view = torch.cat((rows, rows), dim=1)[:, : rows.shape[1]]
    strided = Shard(layer, {"weight": view if weight.is_contiguous() else view.t()})
    part = x[:, : rows.shape[1]].contiguous()
    try:
        error = error_of(layer.quant_method.apply(strided, part, None), layer.quant_method.apply(layer, part, None))
        record.note(f"{label}: a strided weight {'is right' if error <= TOLERANCE else f'differs by {error:.2g}'}")
    except Exception as refusal:
        record.note(f"{label}: a strided weight is refused: {one_line(refusal)}")
