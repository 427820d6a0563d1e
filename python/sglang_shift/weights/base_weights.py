"""One copy of the weights: base weights assembled from the stock TP shards, TP weights as views.

When SGLang creates a projection's weight, its base weight is allocated, of which the stock full-TP shard
is a view: so nothing is held twice, and it lies in the memory that SGLang releases and resumes. After
SGLang has loaded the shards, those of each SP group are all-gathered in SP order:

- column-parallel (QKV, gate_up): stacked on the output dimension, ``[q0 k0 v0 | q1 k1 v1 | ...]``,
  so this rank's TP shard is a contiguous slice of rows;
- row-parallel (o, down): side by side on the input dimension, so the TP shard is a slice of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_shift.errors import Refusal
from sglang_shift.parallel.region import region
from sglang_shift.parallel.topology import SequenceParallel
from sglang_shift.weights.projections import (
    BaseWeight,
    DownProjection,
    GateUpProjection,
    OutputProjection,
    Projection,
    QkvProjection,
)

UNKNOWN_LAYER = Refusal(
    "{model} has a layer that SP mode cannot run: {layer} {problem}; serve this model without --sp-size and "
    "--enable-shift-parallel",
    "A rank checks this after loading. A linear layer must be of a pair of QKV and output beside an attention, or of a "
    "pair of gate_up and down. It must not be quantized, gather its output, split its input, or return its bias "
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
        parallel: The groups.

    Raises:
        Refused: a layer is of a kind, or in a place, that SP mode does not know.
    """

    def __init__(self, model: torch.nn.Module, parallel: SequenceParallel) -> None:
        self.model = model
        self.parallel = parallel
        self.projections: list[Projection] = []
        self.stale = False  # whether SGLang may have written shards since they were gathered
        for linear, kind in find_projections(model):
            base = _assemble(linear, parallel)
            linear.ulysses = kind(linear, base, parallel)
            self.projections.append(linear.ulysses)

    def refresh(self) -> None:
        """All-gather again, in place, after SGLang wrote new values into this rank's shards.

        Collective: every rank calls it, before the first SP step after a weight update.
        """
        self.stale = False
        for projection in self.projections:
            linear, base = projection.linear, projection.base
            _gather_into(base.weight, linear.weight.data, self.parallel, _shard_dim(linear))
            if base.bias is not None and linear.bias is not None and _shard_dim(linear) == 0:
                _gather_into(base.bias, linear.bias.data, self.parallel, 0)

    def report(self) -> WeightReport:
        """What this rank holds, measured from the tensors' storages."""
        tensors = [p.data for p in self.model.parameters()] + [p.base.weight for p in self.projections]
        tensors += [p.base.bias for p in self.projections if p.base.bias is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        beyond = sum(_bytes_beyond_base(p, self.parallel.layout.base_tp_size) for p in self.projections)
        return WeightReport(sum(storages.values()), beyond)


def find_projections(model: torch.nn.Module) -> Iterator[tuple[Any, type[Projection]]]:
    """Every parallel linear of a dense decoder with its role in SP mode.

    Raises:
        Refused: a parallel linear is not one of a QKV/output pair beside a RadixAttention or of a
            gate_up/down pair, or another module has weights and is no norm and no embedding: what it
            sums, and over which ranks, is not known.
    """
    roles: dict[torch.nn.Module, type[Projection]] = {}
    for parent in model.modules():
        children = list(parent.children())
        rows = [c for c in children if isinstance(c, RowParallelLinear)]
        qkv = [c for c in children if isinstance(c, QKVParallelLinear)]
        merged = [c for c in children if isinstance(c, MergedColumnParallelLinear)]
        if len(qkv) == len(rows) == 1 and any(isinstance(c, RadixAttention) for c in children):
            roles[qkv[0]], roles[rows[0]] = QkvProjection, OutputProjection
        elif len(merged) == len(rows) == 1 and len(merged[0].output_sizes) == 2:
            roles[merged[0]], roles[rows[0]] = GateUpProjection, DownProjection
    for name, module in model.named_modules():
        linear = isinstance(module, ColumnParallelLinear | RowParallelLinear)
        problem = _problem_with(module, known=module in roles) if linear else _stranger(module)
        if problem:
            raise UNKNOWN_LAYER(model=type(model).__name__, layer=name, problem=problem)
        if linear:
            yield module, roles[module]


class BaseLinearMethod(UnquantizedLinearMethod):
    """SGLang's unquantized linear, whose weight is created as a view of its base weight."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """As SGLang's, then make room for the base weight."""
        super().create_weights(layer, *args, **kwargs)
        if region.parallel is not None and isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            reserve(layer.weight, region.parallel, _shard_dim(layer))


def reserve(param: torch.nn.Parameter, parallel: SequenceParallel, dim: int) -> None:
    """Allocate the base tensor of ``param``, as ``param.ulysses_base``, and make ``param`` this rank's slice of it.

    Args:
        param: A stock full-TP shard; its values stay.
        parallel: The groups.
        dim: Of the shards: S of them make the base tensor.
    """
    shard = param.data
    shape = list(shard.shape)
    shape[dim] *= parallel.layout.sp_size
    base = shard.new_empty(shape)
    param.data = base.narrow(dim, parallel.sp_index * shard.shape[dim], shard.shape[dim]).copy_(shard)
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


def _assemble(linear: Any, parallel: SequenceParallel) -> BaseWeight:
    """Build the base weight and bias, and make the layer's parameters views of them."""
    dim = _shard_dim(linear)
    weight = _grown(linear.weight, parallel, dim)
    if linear.bias is None or dim == 1:  # a row-parallel bias is whole on every rank
        return BaseWeight(weight, None if linear.bias is None else linear.bias.data)
    return BaseWeight(weight, _grown(linear.bias, parallel, 0))


def _grown(param: torch.nn.Parameter, parallel: SequenceParallel, dim: int) -> torch.Tensor:
    """The base tensor of ``param``, with the values of all ranks' shards."""
    if not hasattr(param, "ulysses_base"):  # a bias, which no method creates
        reserve(param, parallel, dim)
    _gather_into(param.ulysses_base, param.data, parallel, dim)
    return param.ulysses_base


def _gather_into(base: torch.Tensor, shard: torch.Tensor, parallel: SequenceParallel, dim: int) -> None:
    """All-gather ``shard``, a slice of ``base``, over the SP group into ``base``, side by side on ``dim``.

    Besides ``base`` this takes as much memory as one shard, or 1 + 1/S of it where columns stand side by side: there
    a part of the rows is gathered at a time.
    """
    size = parallel.layout.sp_size
    if dim == 0:
        parallel.sp_group.all_gather_into_tensor(base, shard.clone())
        return
    for rows, part in zip(base.tensor_split(size), shard.tensor_split(size), strict=True):
        gathered = shard.new_empty((size * part.shape[0], part.shape[1]))
        parallel.sp_group.all_gather_into_tensor(gathered, part.contiguous())
        for i, block in enumerate(gathered.chunk(size) if part.shape[0] else ()):
            rows.narrow(1, i * part.shape[1], part.shape[1]).copy_(block)


def _bytes_beyond_base(projection: Projection, base_tp_size: int) -> int:
    """Bytes of K and V heads that this rank holds more often than a stock TP = P/S rank would."""
    linear = projection.linear
    if not isinstance(linear, QKVParallelLinear):
        return 0
    stock_heads = linear.total_num_heads // base_tp_size + 2 * max(1, linear.total_num_kv_heads // base_tp_size)
    base = projection.base
    row_bytes = base.weight.shape[1] * base.weight.element_size()
    row_bytes += 0 if base.bias is None else base.bias.element_size()
    return (base.weight.shape[0] - stock_heads * linear.head_size) * row_bytes
