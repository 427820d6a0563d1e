"""One copy of the weights: base weights are assembled from the stock TP shards, and TP weights are views of them.

When SGLang creates the weight of a projection, we allocate its base weight. The stock full-TP shard becomes a view of
it. So nothing is in memory twice, and the base weight lies in the memory that SGLang can release and resume. After
SGLang has loaded the shards, each SP group all-gathers its shards in SP order:

- column-parallel (QKV, gate_up): the shards are stacked on the output dimension, ``[q0 k0 v0 | q1 k1 v1 | ...]``.
  So this rank's TP shard is a contiguous slice of rows.
- row-parallel (o, down): the shards are side by side on the input dimension. So the TP shard is a slice of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_shift.errors import Refusal
from sglang_shift.models.families import Linear, Role, family_of
from sglang_shift.models.heads import Heads
from sglang_shift.parallel.exchange.base import ExchangeVolume, SequenceExchange
from sglang_shift.parallel.topology import Topology
from sglang_shift.seams import overrides, substitutes_for
from sglang_shift.weights.projections import (
    BaseWeight,
    DownProjection,
    GateUpProjection,
    OutputProjection,
    Projection,
    QkvProjection,
)

KINDS: dict[Role, tuple[type, type[Projection]]] = {
    Role.QKV: (QKVParallelLinear, QkvProjection),
    Role.OUTPUT: (RowParallelLinear, OutputProjection),
    Role.GATE_UP: (MergedColumnParallelLinear, GateUpProjection),
    Role.DOWN: (RowParallelLinear, DownProjection),
}
"""For each role, the class of SGLang's linear, and the class of its projection in SP mode."""

UNKNOWN_LAYER = Refusal(
    "{model} has a layer that SP mode cannot run: {layer} {problem}; serve this model without --sp-size and "
    "--enable-shift-parallel",
    "A rank checks this after loading. A linear layer must be one of its family: "
    "[Families](models.md#families). It must not be quantized, gather its output, split its input, or return its bias "
    "instead of adding it. Any other layer with weights must be a norm or an embedding; experts, for example, are "
    "neither.",
)


@dataclass(frozen=True)
class WeightReport:
    """Weight memory of one rank, in bytes.

    Attributes:
        total: All weights on this rank. Each storage counts once.
        beyond_base: The part of ``total`` that the projections of a stock deployment with TP = P/S would not hold. It
            is 0 unless KV heads are replicated.
    """

    total: int
    beyond_base: int


class BaseWeights:
    """The base weights of a model.

    Args:
        model: A loaded SGLang model whose linears hold stock full-TP shards.
        topology: The groups that share the weights.

    Raises:
        Refused: SP mode does not know the kind or the place of a layer.
    """

    def __init__(self, model: torch.nn.Module, topology: Topology) -> None:
        self.model = model
        self.topology = topology
        self.projections: list[Projection] = []
        self.stale = False  # whether SGLang may have written shards since they were gathered
        family = family_of(model)
        for linear, kind in find_projections(model, family.linears if family else ()):
            base = _assemble(linear, topology)
            linear.shift_projection = kind(linear, base)
            self.projections.append(linear.shift_projection)

    def refresh(self) -> None:
        """All-gather again, in place, after SGLang has written new values into this rank's shards.

        This is a collective. Every rank calls it before the first SP step after a weight update.
        """
        self.stale = False
        for projection in self.projections:
            linear, base = projection.linear, projection.base
            _gather_into(base.weight, linear.weight.data, self.topology, _shard_dim(linear))
            if base.bias is not None and linear.bias is not None and _shard_dim(linear) == 0:
                _gather_into(base.bias, linear.bias.data, self.topology, 0)

    def report(self) -> WeightReport:
        """The weight memory of this rank, measured from the storages of its tensors."""
        tensors = [p.data for p in self.model.parameters()] + [p.base.weight for p in self.projections]
        tensors += [p.base.bias for p in self.projections if p.base.bias is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        beyond = sum(_bytes_beyond_base(p, self.topology.layout.base_tp_size) for p in self.projections)
        return WeightReport(sum(storages.values()), beyond)

    def exchange_volume(self, exchange: SequenceExchange, dtype: torch.dtype) -> ExchangeVolume:
        """How much the exchanges of one step send.

        They send Q, K and V after each QKV projection, and O before each output projection.

        Args:
            exchange: The exchange of the steps.
            dtype: The type of activations.
        """
        size = self.topology.layout.sp_size
        columns = [
            projection.base.weight.shape[0 if isinstance(projection, QkvProjection) else 1] // size
            for projection in self.projections
            if isinstance(projection, QkvProjection | OutputProjection)
        ]
        return ExchangeVolume(size, len(columns), sum(exchange.row_bytes(n, dtype.itemsize) for n in columns))


def find_projections(model: torch.nn.Module, linears: Iterable[Linear]) -> Iterator[tuple[Any, type[Projection]]]:
    """Find every parallel linear of a decoder, with the class of its projection in SP mode.

    Args:
        model: A loaded SGLang model.
        linears: The linears of each layer, from the record of the model's family.

    Raises:
        Refused: the record does not have a parallel linear, or another module with weights is neither a norm nor an
            embedding. We do not know what such a module sums, and over which ranks.
    """
    for name, module in model.named_modules():
        linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        kind = _kind_of(name, module, linears) if linear else None
        problem = (
            _problem_with_linear(module, in_family=kind is not None) if linear else _problem_with_other_module(module)
        )
        if problem:
            raise UNKNOWN_LAYER(model=type(model).__name__, layer=name, problem=problem)
        if kind:
            yield module, kind


def _kind_of(name: str, module: torch.nn.Module, linears: Iterable[Linear]) -> type[Projection] | None:
    """The projection class for the linear of this name; None if the record lacks the name or has another class."""
    role = next((linear.role for linear in linears if name.endswith("." + linear.name)), None)
    if role is None or type(module) is not KINDS[role][0]:
        return None
    return KINDS[role][1]


@substitutes_for(
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "SGLang's linears build the class of this name",
)
class BaseLinearMethod(UnquantizedLinearMethod):
    """SGLang's method for unquantized linears. It creates each weight as a view of its base weight."""

    @overrides("creates a weight as a view of its base weight")
    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        topology = _loading_for.get()
        if topology is not None and isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            reserve(layer.weight, topology, _shard_dim(layer))


_loading_for: ContextVar[Topology | None] = ContextVar("the topology that a model is loaded for", default=None)


@contextmanager
def loading_for(topology: Topology) -> Iterator[None]:
    """Inside of this context, SGLang creates linears with room for the base weights of ``topology``.

    A context variable holds the topology, because SGLang passes no argument of ours to the linears.
    """
    token = _loading_for.set(topology)
    try:
        yield
    finally:
        _loading_for.reset(token)


def reserve(param: torch.nn.Parameter, topology: Topology, dim: int) -> None:
    """Allocate the base tensor of ``param``, as ``param.shift_base``, and make ``param`` this rank's slice of it.

    Args:
        param: A stock full-TP shard. It keeps its values.
        topology: The groups that share the weights.
        dim: The dimension on which S shards make the base tensor.
    """
    shard = param.data
    shape = list(shard.shape)
    shape[dim] *= topology.layout.sp_size
    base = shard.new_empty(shape)
    param.data = base.narrow(dim, topology.sp_index * shard.shape[dim], shard.shape[dim]).copy_(shard)
    param.shift_base = base


def _problem_with_linear(linear: Any, *, in_family: bool) -> str | None:
    if not in_family:
        return "is neither of a QKV/output pair nor of a gate_up/down pair"
    if not isinstance(linear.quant_method, UnquantizedLinearMethod):
        return f"is quantized ({type(linear.quant_method).__name__})"
    if getattr(linear, "gather_output", False) or not getattr(linear, "input_is_parallel", True):
        return "gathers its output or splits its input"
    return "returns its bias instead of adding it" if linear.skip_bias_add else None


def _problem_with_other_module(module: torch.nn.Module) -> str | None:
    """The problem of a module that is not a parallel linear. Experts, for example, divide and sum in their own way."""
    if isinstance(module, VocabParallelEmbedding | RMSNorm) or next(module.parameters(recurse=False), None) is None:
        return None
    return f"is a {type(module).__name__}, which is no projection, norm or embedding"


def _shard_dim(linear: Any) -> int:
    return 0 if isinstance(linear, ColumnParallelLinear) else 1


def _assemble(linear: Any, topology: Topology) -> BaseWeight:
    """Build the base weight and bias of a linear, and make its parameters views of them."""
    dim = _shard_dim(linear)
    weight = _gather_base(linear.weight, topology, dim)
    if linear.bias is None or dim == 1:  # every rank has the whole bias of a row-parallel linear
        return BaseWeight(weight, None if linear.bias is None else linear.bias.data)
    return BaseWeight(weight, _gather_base(linear.bias, topology, 0))


def _gather_base(param: torch.nn.Parameter, topology: Topology, dim: int) -> torch.Tensor:
    """The base tensor of ``param``, with the values of all ranks' shards."""
    if not hasattr(param, "shift_base"):  # this is a bias; BaseLinearMethod creates weights only
        reserve(param, topology, dim)
    _gather_into(param.shift_base, param.data, topology, dim)
    return param.shift_base


def _gather_into(base: torch.Tensor, shard: torch.Tensor, topology: Topology, dim: int) -> None:
    """All-gather ``shard``, a slice of ``base``, over the SP group into ``base``. Shards are side by side on ``dim``.

    For rows (``dim`` 0), this needs the memory of one more shard. For columns (``dim`` 1), it needs 1 + 1/S times the
    memory of a shard, because it gathers 1/S of the rows at a time.
    """
    size = topology.layout.sp_size
    if dim == 0:
        topology.sp_group.all_gather_into_tensor(base, shard.clone())
        return
    for rows, part in zip(base.tensor_split(size), shard.tensor_split(size), strict=True):
        gathered = shard.new_empty((size * part.shape[0], part.shape[1]))
        topology.sp_group.all_gather_into_tensor(gathered, part.contiguous())
        for i, block in enumerate(gathered.chunk(size) if part.shape[0] else ()):
            rows.narrow(1, i * part.shape[1], part.shape[1]).copy_(block)


def _bytes_beyond_base(projection: Projection, base_tp_size: int) -> int:
    """Bytes of K and V heads that this rank holds beyond what a rank of a stock TP = P/S deployment holds."""
    linear = projection.linear
    if not isinstance(linear, QKVParallelLinear):
        return 0
    stock_heads = Heads(linear.total_num_heads, linear.total_num_kv_heads).of_rank(base_tp_size).qkv
    base = projection.base
    row_bytes = base.weight.shape[1] * base.weight.element_size()
    row_bytes += 0 if base.bias is None else base.bias.element_size()
    return (base.weight.shape[0] - stock_heads * linear.head_size) * row_bytes
