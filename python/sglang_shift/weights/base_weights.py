"""One copy of the weights: base weights assembled from the stock TP shards, TP weights as views.

When SGLang creates a projection's weight, its base weight is allocated, of which the stock full-TP shard
is a view: so nothing is held twice, and it lies in the memory that SGLang releases and resumes. After
SGLang has loaded the shards, those of each SP group are all-gathered in SP order:

- column-parallel (QKV, gate_up): stacked on the output dimension, ``[q0 k0 v0 | q1 k1 v1 | ...]``,
  so this rank's TP shard is a contiguous slice of rows;
- row-parallel (o, down): side by side on the input dimension, so the TP shard is a slice of columns.
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
"""SGLang's linear of each role, and what it is in SP mode."""

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
        total: All weights held, each storage counted once.
        beyond_base: Of these, what a stock (TP = P/S) deployment's projections would not hold:
            0 unless KV heads are replicated.
    """

    total: int
    beyond_base: int


class BaseWeights:
    """The base weights of a model.

    Args:
        model: A loaded SGLang model whose linears hold stock full-TP shards.
        topology: The groups that share the weights.

    Raises:
        Refused: a layer is of a kind, or in a place, that SP mode does not know.
    """

    def __init__(self, model: torch.nn.Module, topology: Topology) -> None:
        self.model = model
        self.topology = topology
        self.projections: list[Projection] = []
        self.stale = False  # whether SGLang may have written shards since they were gathered
        family = family_of(model)
        for linear, kind in find_projections(model, family.linears if family else ()):
            base = _assemble(linear, topology)
            linear.ulysses = kind(linear, base)
            self.projections.append(linear.ulysses)

    def refresh(self) -> None:
        """All-gather again, in place, after SGLang wrote new values into this rank's shards.

        Collective: every rank calls it, before the first SP step after a weight update.
        """
        self.stale = False
        for projection in self.projections:
            linear, base = projection.linear, projection.base
            _gather_into(base.weight, linear.weight.data, self.topology, _shard_dim(linear))
            if base.bias is not None and linear.bias is not None and _shard_dim(linear) == 0:
                _gather_into(base.bias, linear.bias.data, self.topology, 0)

    def report(self) -> WeightReport:
        """What this rank holds, measured from the tensors' storages."""
        tensors = [p.data for p in self.model.parameters()] + [p.base.weight for p in self.projections]
        tensors += [p.base.bias for p in self.projections if p.base.bias is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        beyond = sum(_bytes_beyond_base(p, self.topology.layout.base_tp_size) for p in self.projections)
        return WeightReport(sum(storages.values()), beyond)

    def exchange_volume(self, exchange: SequenceExchange, dtype: torch.dtype) -> ExchangeVolume:
        """What the exchanges of one step send: Q, K and V after each QKV projection, O before each output projection.

        Args:
            exchange: That of the steps.
            dtype: Of activations.
        """
        size = self.topology.layout.sp_size
        columns = [
            projection.base.weight.shape[0 if isinstance(projection, QkvProjection) else 1] // size
            for projection in self.projections
            if isinstance(projection, QkvProjection | OutputProjection)
        ]
        return ExchangeVolume(size, len(columns), sum(exchange.row_bytes(n, dtype.itemsize) for n in columns))


def find_projections(model: torch.nn.Module, linears: Iterable[Linear]) -> Iterator[tuple[Any, type[Projection]]]:
    """Every parallel linear of a decoder with what it is in SP mode.

    Args:
        model: A loaded SGLang model.
        linears: The linears of each layer, from the record of the model's family.

    Raises:
        Refused: a parallel linear is not among these, or another module has weights and is no norm and no embedding:
            what it sums, and over which ranks, is not known.
    """
    for name, module in model.named_modules():
        linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        kind = _kind_of(name, module, linears) if linear else None
        problem = _problem_with(module, known=kind is not None) if linear else _stranger(module)
        if problem:
            raise UNKNOWN_LAYER(model=type(model).__name__, layer=name, problem=problem)
        if kind:
            yield module, kind


def _kind_of(name: str, module: torch.nn.Module, linears: Iterable[Linear]) -> type[Projection] | None:
    """What the linear of this name is in SP mode; None if the record has no such linear, or another class for it."""
    role = next((linear.role for linear in linears if name.endswith("." + linear.name)), None)
    if role is None or type(module) is not KINDS[role][0]:
        return None
    return KINDS[role][1]


@substitutes_for(
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "SGLang's linears build the class of this name",
)
class BaseLinearMethod(UnquantizedLinearMethod):
    """SGLang's unquantized linear, whose weight is created as a view of its base weight."""

    @overrides("creates a weight as a view of its base weight")
    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """As SGLang's, then make room for the base weight."""
        super().create_weights(layer, *args, **kwargs)
        topology = _loading_for.get()
        if topology is not None and isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            reserve(layer.weight, topology, _shard_dim(layer))


_loading_for: ContextVar[Topology | None] = ContextVar("the topology that a model is loaded for", default=None)


@contextmanager
def loading_for(topology: Topology) -> Iterator[None]:
    """Inside, the linears that SGLang creates have room for the base weights of ``topology``.

    SGLang creates them without arguments of ours.
    """
    token = _loading_for.set(topology)
    try:
        yield
    finally:
        _loading_for.reset(token)


def reserve(param: torch.nn.Parameter, topology: Topology, dim: int) -> None:
    """Allocate the base tensor of ``param``, as ``param.ulysses_base``, and make ``param`` this rank's slice of it.

    Args:
        param: A stock full-TP shard; its values stay.
        topology: The groups that share the weights.
        dim: Of the shards: S of them make the base tensor.
    """
    shard = param.data
    shape = list(shard.shape)
    shape[dim] *= topology.layout.sp_size
    base = shard.new_empty(shape)
    param.data = base.narrow(dim, topology.sp_index * shard.shape[dim], shard.shape[dim]).copy_(shard)
    param.ulysses_base = base


def _problem_with(linear: Any, *, known: bool) -> str | None:
    if not known:
        return "is neither of a QKV/output pair nor of a gate_up/down pair"
    if not isinstance(linear.quant_method, UnquantizedLinearMethod):
        return f"is quantized ({type(linear.quant_method).__name__})"
    if getattr(linear, "gather_output", False) or not getattr(linear, "input_is_parallel", True):
        return "gathers its output or splits its input"
    return "returns its bias instead of adding it" if linear.skip_bias_add else None


def _stranger(module: torch.nn.Module) -> str | None:
    """What is wrong with a module that is no parallel linear: experts, say, divide and sum in a way of their own."""
    if isinstance(module, VocabParallelEmbedding | RMSNorm) or next(module.parameters(recurse=False), None) is None:
        return None
    return f"is a {type(module).__name__}, which is no projection, norm or embedding"


def _shard_dim(linear: Any) -> int:
    return 0 if isinstance(linear, ColumnParallelLinear) else 1


def _assemble(linear: Any, topology: Topology) -> BaseWeight:
    """Build the base weight and bias, and make the layer's parameters views of them."""
    dim = _shard_dim(linear)
    weight = _grown(linear.weight, topology, dim)
    if linear.bias is None or dim == 1:  # a row-parallel bias is whole on every rank
        return BaseWeight(weight, None if linear.bias is None else linear.bias.data)
    return BaseWeight(weight, _grown(linear.bias, topology, 0))


def _grown(param: torch.nn.Parameter, topology: Topology, dim: int) -> torch.Tensor:
    """The base tensor of ``param``, with the values of all ranks' shards."""
    if not hasattr(param, "ulysses_base"):  # a bias, which no method creates
        reserve(param, topology, dim)
    _gather_into(param.ulysses_base, param.data, topology, dim)
    return param.ulysses_base


def _gather_into(base: torch.Tensor, shard: torch.Tensor, topology: Topology, dim: int) -> None:
    """All-gather ``shard``, a slice of ``base``, over the SP group into ``base``, side by side on ``dim``.

    Besides ``base`` this takes as much memory as one shard, or 1 + 1/S of it where columns stand side by side: there
    a part of the rows is gathered at a time.
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
    """Bytes of K and V heads that this rank holds more often than a stock TP = P/S rank would."""
    linear = projection.linear
    if not isinstance(linear, QKVParallelLinear):
        return 0
    stock_heads = Heads(linear.total_num_heads, linear.total_num_kv_heads).of_rank(base_tp_size).qkv
    base = projection.base
    row_bytes = base.weight.shape[1] * base.weight.element_size()
    row_bytes += 0 if base.bias is None else base.bias.element_size()
    return (base.weight.shape[0] - stock_heads * linear.head_size) * row_bytes
