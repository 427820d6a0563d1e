"""One copy of the weights: base weights are assembled from the stock TP shards, and TP weights are views of them.

When SGLang creates the weight of a linear, we allocate its base weight. The stock full-TP shard becomes a view of it.
So nothing is in memory twice, and the base weight lies in the memory that SGLang can release and resume. After SGLang
has loaded the shards, each SP group all-gathers its shards in SP order:

- column-parallel (QKV, gate_up): the shards are stacked on the output dimension, ``[q0 k0 v0 | q1 k1 v1 | ...]``.
  So this rank's TP shard is a contiguous slice of rows.
- row-parallel (o, down): the shards are side by side on the input dimension. So the TP shard is a slice of columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_shift.models.heads import Heads
from sglang_shift.parallel.topology import Topology
from sglang_shift.seams import overrides, substitutes_for
from sglang_shift.weights.stacked import Rows, StackedShards, stack_shards
from sglang_shift.weights.stacked_base import StackedBase, tensors_of


class Base(Protocol):
    """The weight and bias of a linear in the base configuration: the TP shards of the S ranks of an SP group."""

    @property
    def outputs(self) -> int:
        """Columns of the product: of S shards if the linear is column-parallel."""

    @property
    def inputs(self) -> int:
        """Columns of its operand: of S shards if the linear is row-parallel."""

    def columns(self, x: Rows) -> torch.Tensor:
        """Multiply by the shards of a column-parallel linear: ``[n, h]`` to ``[n, S * columns of a shard]``."""

    def rows(self, x: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        """Multiply by the shards of a row-parallel linear and sum: ``[n, S * columns of a shard]`` to ``[n, h]``."""

    @property
    def text(self) -> str:
        """How a step multiplies with it, in a few words."""

    def refresh(self) -> None:
        """All-gather again, in place, after SGLang has written new values into this rank's shard. Collective."""

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that hold the base weight and the bias."""


@dataclass
class BaseWeight:
    """The base weight of an unquantized linear: one tensor, and so one GEMM.

    SGLang's ``quant_method.apply`` reads it like a layer.

    Attributes:
        linear: SGLang's linear. Its parameters are views.
        topology: The groups that share the weight.
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]``, or None.
        complete: Whether this rank has the memory of all shards now.
    """

    linear: Any
    topology: Topology
    weight: torch.Tensor
    bias: torch.Tensor | None
    complete: bool = True
    text: ClassVar[str] = "one GEMM"

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    def columns(self, x: Rows) -> torch.Tensor:
        product: torch.Tensor = self.linear.quant_method.apply(self, x, self.bias)
        return product

    def rows(self, x: torch.Tensor, *, with_bias: bool) -> torch.Tensor:
        product: torch.Tensor = self.linear.quant_method.apply(self, x, self.bias if with_bias else None)
        return product

    def refresh(self) -> None:
        dim = _shard_dim(self.linear)
        if self.complete:
            _gather_into(self.weight, self.linear.weight.data, self.topology, dim)
        if self.bias is not None and self.linear.bias is not None and dim == 0:
            _gather_into(self.bias, self.linear.bias.data, self.topology, 0)

    def tensors(self) -> list[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shard_dim(self) -> int:
        """The dimension of the weight on which the shards are side by side."""
        return _shard_dim(self.linear)

    def move(self, weight: torch.Tensor) -> None:
        """Move the weight into other memory, together with this rank's shard, which is a view of it.

        Args:
            weight: A tensor of the same shape and type, with any strides.
        """
        shard, dim = self.linear.weight, self.shard_dim
        size = shard.shape[dim]
        weight.copy_(self.weight)
        shard.data = weight.narrow(dim, self.topology.sp_index * size, size)
        self.weight = shard.shift_base = weight


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

    Attributes:
        bases: The base weights so far, by linear.
        experts: The stacked experts so far, by layer.
        tables: The parameters of embeddings and LM heads whose rows are gathered, each with the ranks that have parts.
            Only instances do so.
        stale: Whether SGLang may have written shards since they were gathered.
    """

    def __init__(self, model: torch.nn.Module, topology: Topology) -> None:
        self.model = model
        self.topology = topology
        self.bases: dict[torch.nn.Module, Base] = {}
        self.experts: dict[torch.nn.Module, StackedShards] = {}
        self.tables: list[tuple[torch.nn.Parameter, Topology]] = []
        self.stale = False

    def assemble(self, linear: Any, name: str = "") -> Base:
        """Build the base weight of a linear, and make the linear's parameters views of it. Collective.

        Args:
            linear: A parallel linear of SGLang's, after loading.
            name: Its name in the model, for errors.

        Raises:
            Refused: the linear is quantized in a way that SP mode cannot share.
        """
        base: Base
        if isinstance(linear.quant_method, UnquantizedLinearMethod):
            base = _assemble(linear, self.topology)
        else:
            base = StackedBase(linear, self.topology, name)
        self.bases[linear] = base
        return base

    def stack_experts(self, experts: Any, name: str = "") -> StackedShards:
        """Give this rank the experts of all ranks of its SP group. The experts' own tensors become views. Collective.

        Args:
            experts: An experts layer of SGLang's, after loading.
            name: Its name in the model, for errors.

        Raises:
            Refused: the experts are quantized in a way that SP mode cannot share.
        """
        shards = self.experts[experts] = stack_shards(experts, self.topology, name)
        return shards

    def gather_table(self, param: torch.nn.Parameter, topology: Topology) -> None:
        """Gather all rows of an embedding or LM head, as ``param.shift_base``. ``param`` becomes a view. Collective.

        Args:
            param: Its parameter.
            topology: Each rank of its SP group has a part of the rows, in the order of the ranks.
        """
        _gather_base(param, topology, 0)
        self.tables.append((param, topology))

    @property
    def text(self) -> str:
        """How SP steps multiply with the linears, in words."""
        counts = Counter(base.text for base in self.bases.values())
        return ", ".join(f"{count} with {text}" for text, count in counts.items())

    def refresh(self) -> None:
        """All-gather again, in place, after SGLang has written new values into this rank's shards.

        This is a collective. Every rank calls it before the first SP step after a weight update, or before it becomes a
        rank of another instance.
        """
        self.stale = False
        for base in self.bases.values():
            base.refresh()
        for shards in self.experts.values():
            shards.refresh()
        for param, topology in self.tables:
            _gather_base(param, topology, 0)

    def release_unused(self) -> None:
        """Free the base weights that were reserved for linears that need none. Their shards keep their values."""
        for module in self.model.modules():
            weight: Any = getattr(module, "weight", None)
            if module not in self.bases and hasattr(weight, "shift_base"):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
                del weight.shift_base

    def report(self) -> WeightReport:
        """The weight memory of this rank, measured from the storages of its tensors."""
        tensors = [p.data for p in self.model.parameters()]
        tensors += [tensor for base in self.bases.values() for tensor in base.tensors()]
        tensors += [tensor for shards in self.experts.values() for tensor in tensors_of(shards)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        beyond = sum(_bytes_beyond_base(*pair, self.topology.layout.base_tp_size) for pair in self.bases.items())
        return WeightReport(sum(storages.values()), beyond)


@substitutes_for(
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "SGLang's linear layers make their method from the class of this name.",
)
class BaseLinearMethod(UnquantizedLinearMethod):
    """SGLang's method for unquantized linears. It creates each weight as a view of its base weight."""

    @overrides("Our method creates a weight as a view of its base weight.")
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


def _shard_dim(linear: Any) -> int:
    return 0 if isinstance(linear, ColumnParallelLinear) else 1


def _assemble(linear: Any, topology: Topology) -> BaseWeight:
    """Build the base weight and bias of a linear, and make its parameters views of them."""
    dim = _shard_dim(linear)
    weight, bias = _gather_base(linear.weight, topology, dim), linear.bias
    if bias is not None:  # every rank has the whole bias of a row-parallel linear
        bias = bias.data if dim == 1 else _gather_base(bias, topology, 0)
    return BaseWeight(linear, topology, weight, bias)


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


def _bytes_beyond_base(linear: Any, base: Base, base_tp_size: int) -> int:
    """Bytes of K and V heads that this rank holds beyond what a rank of a stock TP = P/S deployment holds."""
    if not isinstance(linear, QKVParallelLinear):
        return 0
    stock_heads = Heads(linear.total_num_heads, linear.total_num_kv_heads).of_rank(base_tp_size).qkv
    beyond = base.outputs - stock_heads * linear.head_size
    return sum(tensor.nbytes for tensor in base.tensors()) * beyond // base.outputs
