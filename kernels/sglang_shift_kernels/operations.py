"""The operations of the kernels in a step, as examples: to check them against the reference, time and compile them."""

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
        total_bytes: Bytes that the kernel loads and stores.
        minimum: Bytes that it must load and store: each byte that it needs once, and each byte of the result once.
    """

    total_bytes: int
    minimum: int


def traffic(source: torch.Tensor, result: torch.Tensor) -> Traffic:
    """Return the bytes that the Triton kernel moved to make ``result`` from ``source``. A view moves nothing.

    One tensor is a matrix, and the other is blocks. A quantized row has its scale four times, and one would be enough.
    The kernel stores all four, and loads one.
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
        function: Name of the function in an implementation: the modules ``gpu``, ``cpu`` and ``reference``.
        arguments: Arguments of the function. The first one is the tensor.
    """

    name: str
    function: str
    arguments: tuple[Any, ...]

    def run(self, implementation: Any) -> torch.Tensor:
        """Return the result of this implementation's function."""
        result: torch.Tensor = getattr(implementation, self.function)(*self.arguments)
        return result


@dataclass(frozen=True)
class ExchangeShape:
    """The exchange around one layer's attention, as one rank sees it.

    Attributes:
        size: S.
        rows: Tokens of this rank.
        qkv: Columns that the QKV projection gives for one rank.
        o: Columns of one rank that the O projection takes.
    """

    size: int
    rows: int
    qkv: int
    o: int


def operations(shape: ExchangeShape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[Operation]:
    """Yield all operations that copy, plain and as fp8. ``pack_tokens`` gets one token too few to fill the blocks.

    If a width is not a multiple of 16, fp8 is left out.
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
    """Run each kernel once that an exchange on a GPU may need. Triton compiles and loads a kernel at its first call.

    Args:
        shape: Shape of an exchange. It must have at least two rows, because one row is a view.
        hidden: Columns of an embedding, whose rows are packed without quantizing.
        dtype: Type of the activations.
        device: The GPU.
        fp8: Whether the exchange also quantizes.
    """
    from sglang_shift_kernels import gpu  # if there is CUDA, there is Triton

    for operation in operations(shape, dtype, device):
        if fp8 or "fp8" not in operation.name:
            operation.run(gpu)
    gpu.pack_tokens(torch.zeros(shape.size + 1, hidden, dtype=dtype, device=device), shape.size)
