"""One copy of the weights of any layer: the shards of an SP group, stacked after SGLang has processed them.

SGLang's quantization methods repack, transpose, pad and swizzle weights after loading, each in its own way. So no base
weight is assembled from them. Every rank of an SP group gets all S shards as they are, ``[S, *shard]``, in the layout
in which SGLang's kernels want a shard. The layer's own tensors become views of this rank's shard, so TP reads the same
memory. SP runs the layer's own method once for each shard:

- column-parallel: the outputs are side by side, ``[shard 0 | shard 1 | ...]``;
- row-parallel: the outputs are summed, as the all-reduce of TP sums them;
- experts: the layer runs once with each shard in it, and the outputs are summed.

Scales, zero points and orders stay those of a shard. So SP computes with the numbers of TP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch

from sglang_shift.errors import Refusal, Refused
from sglang_shift.parallel.topology import Topology
from sglang_shift.seams import extends
from sglang_shift.weights.layer_tensors import (
    ALIGNMENT,
    Description,
    Layout,
    Place,
    Shard,
    attributes,
    describe,
    holds_tensors,
    replaced,
)
from sglang_shift.weights.one_gemm import side_by_side

T = TypeVar("T")

QuantizedRows: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.dtype]
"""Rows that SGLang's norm has quantized: as fp8, the one scale of all rows, and the type that they had before."""
Rows: TypeAlias = torch.Tensor | QuantizedRows
"""The input of a column-parallel linear."""

NO_SHARDS = {
    "BitsAndBytes": "keeps the state of the quantization in objects at its weights",
    "GGUF": "pads each rank's weights in its own way",
}
"""How SGLang's methods begin whose tensors are not all that their kernels read, and why."""

CANNOT_SHARE = Refusal(
    "{layer} cannot be shared by TP and SP: it {problem}; serve this model without --sp-size and "
    "--enable-shift-parallel",
    "SP runs SGLang's kernels on the tensors of other ranks, so all that a kernel reads must be in plain tensors. "
    "[Quantization](quantization.md) says which formats this holds for.",
)
DIFFERENT_SHARDS = Refusal(
    "{layer} cannot be shared by TP and SP: {what} is {values} on the ranks of an SP group; choose another --tp-size",
    "SP runs SGLang's kernels on the tensors of other ranks. So shapes, strides and numbers of a layer must be equal.",
)


def stack_shards(layer: torch.nn.Module, topology: Topology, name: str = "") -> StackedShards:
    """Stack the shards of a layer. This is a collective of ``topology.sp_group``.

    Args:
        layer: A linear or an experts layer of SGLang's, after ``process_weights_after_loading``.
        topology: The groups that share the weights.
        name: The name of the layer in its model, for errors.

    Raises:
        Refused: the tensors are not all that a kernel reads, or the layer differs between ranks. All ranks raise it.
    """
    return StackedShards(layer, topology, name)


@extends("sglang.srt.layers.quantization.base_config:LinearMethodBase.apply", "it runs on the shards of other ranks")
class StackedShards:
    """The shards of a layer of all ranks of an SP group. :func:`stack_shards` makes it.

    Attributes:
        layer: SGLang's layer. Its tensors are those of shard ``topology.sp_index``.
        shards: The S shards, in SP order.
        bytes: The memory of all shards. This is all that the rank holds for the layer.
    """

    def __init__(self, layer: Any, topology: Topology, name: str = "") -> None:
        self.layer, self.topology = layer, topology
        self.name = name or type(layer).__name__
        self.shards: list[Shard] = []
        self._layout = Layout((), ())
        self._memory: list[torch.Tensor] = []  # for each block [S, bytes], with padding up to the alignment
        self._own: list[torch.Tensor] = []  # the layer's tensor objects
        self._views: list[list[torch.Tensor]] = []  # for each shard, the tensors in the order of _own
        self._whole: Shard | None = None  # all columns as one shard, if the layout allows it
        self.refresh()

    def refresh(self) -> None:
        """Gather again, after SGLang has written or replaced tensors of the layer. This is a collective.

        If shapes and strides are as before, the memory stays the same. So CUDA graphs stay valid.

        Raises:
            Refused: as in :func:`stack_shards`.
        """
        description, tensors, memory = describe(self.layer)
        self._agree(description)
        if description.layout != self._layout:
            size = self.topology.layout.sp_size
            self._memory = [m.new_empty((size, -(-m.numel() // ALIGNMENT) * ALIGNMENT)) for m in memory]
            self._layout = description.layout
        for stacked, shard in zip(self._memory, memory, strict=True):
            self._gather(stacked, shard)
        self._own = tensors
        pairs = list(zip(tensors, self._layout.places, strict=True))
        numbers = range(self.topology.layout.sp_size)
        self._views = [[self._view(tensor, place, number) for tensor, place in pairs] for number in numbers]
        self.shards = [self._shard(views) for views in self._views]
        self._install(self.topology.sp_index)
        self._whole = side_by_side(self.layer, self.shards)

    @property
    def bytes(self) -> int:
        """The memory of all shards. Memory that several tensors share counts once."""
        return sum(stacked.untyped_storage().nbytes() for stacked in self._memory)

    @property
    def text(self) -> str:
        """How SP multiplies with this layer, for the start-up log."""
        return "one GEMM" if self._whole is not None else "a GEMM for each shard"

    def columns(self, x: Rows, *, add_bias: bool = True) -> torch.Tensor:
        """Multiply with all columns: ``[rows, k]`` to ``[rows, S * n]``, shard by shard.

        Args:
            x: The input of the layer.
            add_bias: Whether to add the layer's bias.
        """
        shards = self.shards if self._whole is None else [self._whole]
        parts = [self._apply(shard, x, add_bias) for shard in shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def rows(self, x: torch.Tensor, *, add_bias: bool) -> torch.Tensor:
        """Multiply with all rows, and sum: ``[rows, S * k]`` to ``[rows, n]``.

        Args:
            x: The inputs of the shards side by side.
            add_bias: Whether to add the layer's bias. It is added once.
        """
        parts = x.chunk(len(self.shards), dim=-1)
        out = self._apply(self.shards[0], parts[0].contiguous(), add_bias)
        for shard, part in zip(self.shards[1:], parts[1:], strict=True):
            out = out + self._apply(shard, part.contiguous(), False)
        return out

    def each_shard(self, run: Callable[[], T]) -> Iterator[T]:
        """Call ``run`` once for each shard, with this shard's tensors in the layer.

        Experts that every rank holds whole run in this way: the outputs are to be summed. Between two results, and
        after an error, the layer has this rank's shard.

        Args:
            run: Runs the layer. It must not change its input: SGLang's experts may write into theirs.
        """
        for number in range(len(self.shards)):
            with self._installed(number):
                result = run()
            yield result

    @contextmanager
    def _installed(self, number: int) -> Iterator[None]:
        self._install(number)
        try:
            yield
        finally:
            self._install(self.topology.sp_index)

    def _install(self, number: int) -> None:
        for tensor, view in zip(self._own, self._views[number], strict=True):
            tensor.data = view

    def _apply(self, shard: Shard, x: Rows, add_bias: bool) -> torch.Tensor:
        return self.layer.quant_method.apply(shard, x, shard.bias if add_bias else None)

    def _agree(self, description: Description) -> None:
        """Compare the description with those of the other ranks. All ranks raise the same error."""
        method = type(getattr(self.layer, "quant_method", None)).__name__
        known = next((why for begin, why in NO_SHARDS.items() if method.startswith(begin)), None)
        if known:
            raise CANNOT_SHARE(layer=self.name, problem=f"is quantized by {method}, which {known}")
        everyone = self.topology.sp_group.all_gather_object(description)
        if problem := next((each.problem for each in everyone if each.problem), None):
            raise CANNOT_SHARE(layer=self.name, problem=problem)
        if any(each != everyone[0] for each in everyone):
            raise _difference(self.name, everyone)

    def _gather(self, stacked: torch.Tensor, shard: torch.Tensor) -> None:
        """All-gather ``shard`` into ``stacked``, of which it may be a part already."""
        count = shard.numel()
        inside = shard.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
        if inside or count < stacked.shape[1]:
            padded = stacked.new_zeros(stacked.shape[1])
            padded[:count] = shard
            shard = padded
        self.topology.sp_group.all_gather_into_tensor(stacked.view(-1), shard)

    def _view(self, tensor: torch.Tensor, place: Place, number: int) -> torch.Tensor:
        """The tensor of shard ``number`` at ``place``."""
        if place.block is None:
            return tensor.detach()
        memory = self._memory[place.block]
        first = number * memory.shape[1] + place.offset
        empty = torch.empty(0, dtype=place.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), first // place.dtype.itemsize, place.shape, place.stride)

    def _shard(self, views: list[torch.Tensor]) -> Shard:
        replacement = {id(tensor): view for tensor, view in zip(self._own, views, strict=True)}
        for tensor, view in zip(self._own, views, strict=True):
            # Kernels read attributes of tensors, such as the format of scales.
            view.__dict__.update({name: replaced(value, replacement) for name, value in vars(tensor).items()})
        held = {name: value for name, value in attributes(self.layer).items() if holds_tensors(value)}
        return Shard(self.layer, {name: replaced(value, replacement) for name, value in held.items()})


def _difference(name: str, everyone: list[Description]) -> Refused:
    """The error for layers that are not equal. It names the first value or tensor that differs."""
    values = [{**each.values, **{p.path: _as_text(p) for p in each.layout.places}} for each in everyone]
    paths = dict.fromkeys(path for each in values for path in each)
    for path in paths:
        found = [each.get(path, "missing") for each in values]
        if any(value != found[0] for value in found):
            return DIFFERENT_SHARDS(layer=name, what=path, values=" and ".join(dict.fromkeys(map(str, found))))
    return DIFFERENT_SHARDS(layer=name, what="the memory of its tensors", values="not laid out equally")


def _as_text(place: Place) -> str:
    return f"{str(place.dtype).removeprefix('torch.')} {list(place.shape)} with strides {list(place.stride)}"
