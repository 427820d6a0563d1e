"""The tensors of one layer: where the layer keeps them, where they lie in memory, and what must be equal on all ranks.

SGLang's quantization methods keep weights, scales, zero points and workspaces wherever they like: as parameters and
buffers, as attributes, in lists and dicts, or as attributes of another tensor. Several of them may share one memory.
Here they are found and described without any knowledge of a method's layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 32
"""Bytes. No kernel reads more at once or wants more of an address, and Triton compiles other code below 16 bytes."""

MODULE_INTERNALS = frozenset(vars(torch.nn.Module()))
"""What PyTorch itself keeps in a module."""

METHODS = frozenset(("quant_method", "scheme", "kernel"))
"""Attributes that compute with a layer. Their own tensors are scratch memory or constants, which all shards can use."""

NOT_WEIGHTS = frozenset(("quant_config", "tp_group", "kv_tp_group", "dispatcher", "runner"))
"""Attributes of layers and methods that hold no weights."""

OF_A_RANK = frozenset(("tp_rank", "moe_tp_rank"))
"""Numbers that name this rank's shard. No kernel reads them."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: Where the layer keeps the tensor, such as ``weight`` or ``tables[0]``.
        block: The number of the block of memory that holds it; None if the tensor is empty.
        offset: Bytes from the start of the block.
        shape, stride, dtype: Those of the tensor.
    """

    path: str
    block: int | None
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """How the tensors of a layer lie in memory.

    Attributes:
        places: One for each tensor. Tensors that share memory are in the same block.
        blocks: The bytes of each block of memory.
    """

    places: tuple[Place, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """What the ranks compare before they gather a layer.

    Attributes:
        layout: How the tensors lie in memory.
        values: Plain values of the layer and of its tensors, by path.
        problem: Why this rank cannot share the layer; None if it can.
    """

    layout: Layout
    values: dict[str, Any]
    problem: str | None


class Shard:
    """One shard of a layer, for SGLang's ``quant_method.apply``: other tensors, and all else is the layer's."""

    def __init__(self, layer: torch.nn.Module, tensors: dict[str, Any]) -> None:
        self.__dict__.update(tensors, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


def held_by(shard: Shard) -> list[str]:
    """The names of the shard's own tensors, and of its containers of tensors."""
    return [name for name in vars(shard) if name != "_layer"]


def describe(layer: torch.nn.Module) -> tuple[Description, list[torch.Tensor], list[torch.Tensor]]:
    """Find the tensors of a layer.

    Returns:
        The description, the tensors in the order of its places, and the memory of each block as bytes.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    problem = "has weights in layers of its own" if any(map(_has_weights, layer.children())) else None
    for path, value in _leaves(layer):
        if isinstance(value, torch.Tensor):
            problem = problem or _problem_with_tensor(path, value)
            tensors[path] = value
        elif _is_plain(value):
            if path.rpartition(".")[2] not in OF_A_RANK:
                values[path] = value
        else:
            problem = problem or _problem_with_object(path, value)
    if len({tensor.device for tensor in tensors.values()}) > 1:
        problem = problem or "has tensors on several devices"
    if problem:
        return Description(Layout((), ()), {}, problem), [], []
    layout, memory = _layout(tensors)
    return Description(layout, values, None), list(tensors.values()), memory


def replaced(value: Any, replacement: dict[int, torch.Tensor]) -> Any:
    """``value`` with other tensors in it. Lists, tuples and dicts are copied if they hold tensors.

    Args:
        value: An attribute of a layer.
        replacement: The new tensor for each ``id`` of an old one.
    """
    if isinstance(value, torch.Tensor):
        return replacement[id(value)]
    if type(value) is dict:
        return {key: replaced(item, replacement) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replaced(item, replacement) for item in value)
    return value


def attributes(layer: torch.nn.Module) -> dict[str, Any]:
    """The layer's parameters, buffers and own attributes by name."""
    own = {name: value for name, value in vars(layer).items() if name not in MODULE_INTERNALS}
    return {**own, **layer._parameters, **layer._buffers}


def holds_tensors(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a list, tuple or dict with one."""
    return any(isinstance(leaf, torch.Tensor) for _, leaf in _items("", value))


def bytes_of(storage: torch.UntypedStorage, first: int, count: int) -> torch.Tensor:
    """``count`` bytes of a storage from ``first`` on, as a tensor that shares its memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, first, (count,), (1,))


def _leaves(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that a layer holds, and what its tensors hold as attributes."""
    seen: set[int] = set()
    pending = list(reversed(attributes(layer).items()))
    while pending:
        name, value = pending.pop()
        for path, leaf in _items(name, value):
            yield path, leaf
            if isinstance(leaf, torch.Tensor) and id(leaf) not in seen:
                seen.add(id(leaf))
                pending += [(f"{path}.{key}", item) for key, item in vars(leaf).items()]


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) is dict:
        for key, item in value.items():
            yield from _items(f"{path}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _items(f"{path}[{number}]", item)
    else:
        yield path, value


def _has_weights(module: torch.nn.Module) -> bool:
    return any(True for tensors in (module.parameters(), module.buffers()) for _ in tensors)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Enum | torch.dtype)


def _problem_with_tensor(path: str, tensor: torch.Tensor) -> str | None:
    if is_lazy(tensor):
        return f"gets the shape of {path} from a file"
    if is_traceable_wrapper_subclass(tensor):
        return f"hides tensors in {path}, a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"has {path} in the layout {tensor.layout}"
    return None


def _problem_with_object(path: str, value: Any) -> str | None:
    name = path.rpartition(".")[2]
    if name in NOT_WEIGHTS:
        return None
    if name in METHODS:
        parts = getattr(value, "__dict__", {}).items()
        items = [item for key, part in parts for item in _items(f"{path}.{key}", part)]
        problems = (_problem_with_object(key, item) for key, item in items if not isinstance(item, torch.Tensor))
        return next(filter(None, problems), None)
    return f"hides tensors in {path}, a {type(value).__name__}" if _hides_tensors(value) else None


def _hides_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an object that is no container holds tensors in its attributes."""
    if depth == 0 or callable(value) or not hasattr(value, "__dict__"):
        return False
    leaves = [leaf for name, item in vars(value).items() for _, leaf in _items(name, item)]
    return any(isinstance(leaf, torch.Tensor) or _hides_tensors(leaf, depth - 1) for leaf in leaves)


def _layout(tensors: dict[str, torch.Tensor]) -> tuple[Layout, list[torch.Tensor]]:
    """Group tensors whose bytes overlap into blocks. A block begins at a multiple of :data:`ALIGNMENT`."""
    spans = {path: _span(tensor) for path, tensor in tensors.items() if tensor.numel()}
    blocks: list[list[int]] = []  # address of the storage, first byte, end
    for storage, first, end in sorted(spans.values()):
        if blocks and blocks[-1][0] == storage and first < blocks[-1][2]:
            blocks[-1][2] = max(blocks[-1][2], end)
        else:
            blocks.append([storage, first, end])
    numbers: dict[int, int] = {}  # blocks are numbered in the order of the layer, not of their addresses
    places, memory = [], []
    for path, tensor in tensors.items():
        number, offset = None, 0
        if path in spans:
            storage, first, _ = spans[path]
            found = next(i for i, (s, a, b) in enumerate(blocks) if s == storage and a <= first < b)
            if found not in numbers:
                numbers[found] = len(numbers)
                _, start, end = blocks[found]
                memory.append(bytes_of(tensor.untyped_storage(), start, end - start))
            number = numbers[found]
            offset = tensor.storage_offset() * tensor.dtype.itemsize - blocks[found][1]
        places.append(Place(path, number, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype))
    return Layout(tuple(places), tuple(block.numel() for block in memory)), memory


def _span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """The storage of a tensor that is not empty, and the bytes from its first to its last element."""
    size = tensor.dtype.itemsize
    first = tensor.storage_offset() * size
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().data_ptr(), first // ALIGNMENT * ALIGNMENT, first + (steps + 1) * size
