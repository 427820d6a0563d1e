"""What the kernels do in a step, as examples: to check them against the reference, to time and to compile them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sglang_shift_kernels import reference
from sglang_shift_kernels.layout import SCALE_BYTES

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes between a kernel and memory.

    Attributes:
        moved: What it loads and what it stores.
        minimum: Each byte it needs loaded once, each byte that the result needs stored once.
    """

    moved: int
    minimum: int


def traffic(source: torch.Tensor, result: torch.Tensor) -> Traffic:
    """What the Triton kernel moved that made ``result`` of ``source``; nothing where that is a view.

    One of them is a matrix, the other blocks. A quantized row has its scale four times, where one would do:
    all are stored, one is loaded.
    """
    if source.data_ptr() == result.data_ptr():
        return Traffic(0, 0)
    total = source.nbytes + result.nbytes
    blocks = source if source.dim() == 3 else result
    spare = blocks.shape[0] * blocks.shape[1] * (SCALE_BYTES - FLOAT_BYTES) * (blocks.dtype is torch.uint8)
    return Traffic(total if blocks is result else total - spare, total - spare)


@dataclass(frozen=True)
class Operation:
    """One packing or unpacking.

    Attributes:
        name: What it does, in words.
        function: Its name in an implementation: the modules ``gpu``, ``cpu`` and ``reference``.
        arguments: For it; the first is the tensor.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]

    def run(self, implementation: Any) -> torch.Tensor:
        """The result, by this implementation's function."""
        result: torch.Tensor = getattr(implementation, self.function)(*self.arguments)
        return result


@dataclass(frozen=True)
class ExchangeShape:
    """The exchange around one layer's attention, as one rank sees it.

    Attributes:
        size: S.
        rows: Tokens of this rank.
        qkv: Columns for one rank that the QKV projection gives.
        o: Columns of one rank that the O projection takes.
    """

    size: int
    rows: int
    qkv: int
    o: int


def operations(shape: ExchangeShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Operation]:
    """All that copies something, plain and as fp8. ``pack_tokens`` gets one token less than fills the blocks.

    fp8 is left out where a width is no multiple of 16.
    """
    size, rows = shape.size, shape.rows
    generator = torch.Generator(device).manual_seed(0)
    heads = torch.randn(rows, size * shape.qkv, generator=generator, device=device).to(dtype)
    tokens = torch.randn(size * rows - 1, shape.o, generator=generator, device=device).to(dtype)
    yield Operation("pack heads", "pack_heads", (heads, size))
    yield Operation("pack tokens", "pack_tokens", (tokens, size))
    yield Operation("unpack heads", "unpack_heads", (reference.pack_tokens(tokens, size), dtype))
    if shape.qkv % SCALE_BYTES == shape.o % SCALE_BYTES == 0:
        yield Operation("pack heads, fp8", "pack_heads", (heads, size, True))
        yield Operation("unpack tokens, fp8", "unpack_tokens", (reference.pack_heads(heads, size, True), dtype))
        yield Operation("pack tokens, fp8", "pack_tokens", (tokens, size, True))
        yield Operation("unpack heads, fp8", "unpack_heads", (reference.pack_tokens(tokens, size, True), dtype))


def warm_up(shape: ExchangeShape, hidden: int, dtype: torch.dtype, device: torch.device | str, fp8: bool) -> None:
    """Run once on a GPU each kernel that an exchange may need: Triton compiles it, and loads it, at its first call.

    Args:
        shape: Of an exchange; at least two rows, as one is a view.
        hidden: Columns of an embedding, whose rows are packed as they are.
        dtype: Of activations.
        device: The GPU.
        fp8: Whether the exchange is quantized too.
    """
    from sglang_shift_kernels import gpu  # Triton is there where CUDA is

    for operation in operations(shape, dtype, device):
        if fp8 or "fp8" not in operation.name:
            operation.run(gpu)
    gpu.pack_tokens(torch.zeros(shape.size + 1, hidden, dtype=dtype, device=device), shape.size)
