"""Triton kernels that quantize while packing and dequantize while unpacking.

A row of a block of D columns is sent as D + 16 bytes. These are D elements in e4m3 (a sign, 4 bits of exponent, 3 of
mantissa; OCP 8-bit Floating Point Specification, revision 1.0), and four times their scale in float32.

The scale is the power of two that brings the row's largest element into [128, 256). So scaling is exact, and the only
error is e4m3's rounding to the nearest value. An element comes back within 1/16 of itself. If it is smaller than 2^-13
of the largest element of its row and block, it comes back within 2^-17 of that largest element.

In bfloat16 there is no further rounding. In float16 there is further rounding only below 2^-14, but an element of
63,488 or more comes back as infinity. NaN stays NaN, and an infinity does not become a number. The other elements of a
row with NaN or an infinity mean nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_shift_kernels import reference
from sglang_shift_kernels.layout import SCALE_BYTES, Layout

SMALLEST = tl.constexpr(reference.SMALLEST)
EXPONENT_BITS = tl.constexpr(reference.EXPONENT_BITS)
HEADROOM_BITS = tl.constexpr(7 << 23)
"""If this is subtracted from the bits of a power of two, the power is divided by 128."""
RECIPROCAL_BITS = tl.constexpr(254 << 23)
"""If the bits of a power of two are subtracted from this, the result is the bits of the reciprocal."""
SCALE_FLOATS = tl.constexpr(SCALE_BYTES // 4)
TILE = 2048
"""Elements of a tile. A tile has whole rows, or one row if a row has more elements."""


@triton.jit(do_not_specialize=["rows", "tokens"])
def quantize_kernel(
    x: tl.tensor,
    elements: tl.tensor,
    scales: tl.tensor,
    rows: int,
    tokens: int,
    width: int,
    block_stride: int,
    row_stride: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Quantize some whole rows of one block: from ``x``, padded with zeros, to bytes.

    Args:
        x: A matrix of floating-point numbers, as for :func:`copies.copy_kernel`.
        elements: ``[S, rows, width + 16]`` as e4m3, contiguous. The first ``width`` are a row's elements.
        scales: The same memory as float32, ``[S, rows, width / 4 + 4]``. The last four are a row's scale.
        rows, tokens, width, block_stride, row_stride: As in :class:`Layout`. ``width`` is a multiple of 16.
        ROWS, COLUMNS: Rows and columns of a tile, with ``COLUMNS >= width``. The grid is (tiles in a column, S).
    """
    block = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    row_of_all = block * rows + row
    in_blocks = (row < rows) & (column < width)
    x += block * block_stride + row.to(tl.int64) * row_stride + column
    value = tl.load(x, in_blocks & (row_of_all < tokens), other=0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 1, keep_dims=True), SMALLEST)
    scale = (largest.to(tl.int32, bitcast=True) & EXPONENT_BITS) - HEADROOM_BITS
    # Not `RECIPROCAL_BITS - scale`: Triton 3.8's interpreter fails if a constant is to the left of a tensor.
    value *= (-scale + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    tl.store(elements + row_of_all * (width + 4 * SCALE_FLOATS) + column, value.to(tl.float8e4nv), in_blocks)
    scales += row_of_all * (width // 4 + SCALE_FLOATS) + width // 4 + tl.arange(0, SCALE_FLOATS)[None, :]
    tl.store(scales, scale.to(tl.float32, bitcast=True), row < rows)


@triton.jit(do_not_specialize=["rows", "tokens"])
def dequantize_kernel(
    x: tl.tensor,
    elements: tl.tensor,
    scales: tl.tensor,
    rows: int,
    tokens: int,
    width: int,
    block_stride: int,
    row_stride: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Dequantize some whole rows of one block: from bytes to ``x``. See :func:`quantize_kernel` for the arguments."""
    block = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    row_of_all = block * rows + row
    row_in_x = (row < rows) & (row_of_all < tokens)
    in_x = row_in_x & (column < width)
    value = tl.load(elements + row_of_all * (width + 4 * SCALE_FLOATS) + column, in_x).to(tl.float32)
    value *= tl.load(scales + row_of_all * (width // 4 + SCALE_FLOATS) + width // 4, row_in_x)
    x += block * block_stride + row.to(tl.int64) * row_stride + column
    tl.store(x, value.to(x.dtype.element_ty), in_x)


def quantize_blocks(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Quantize ``x`` to blocks of bytes.

    Returns:
        ``[S, rows, width + 16]``, contiguous.
    """
    blocks = torch.empty((layout.size, layout.rows, layout.width + SCALE_BYTES), dtype=torch.uint8, device=x.device)
    _launch(quantize_kernel, x, blocks, layout)
    return blocks


def dequantize(blocks: torch.Tensor, x: torch.Tensor, layout: Layout) -> None:
    """Dequantize blocks ``[S, rows, width + 16]`` of :func:`quantize_blocks` to their places in ``x``."""
    _launch(dequantize_kernel, x, blocks, layout)


def _launch(kernel: triton.JITFunction, x: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> None:
    columns = triton.next_power_of_2(layout.width)
    rows = max(1, TILE // columns)
    kernel[triton.cdiv(layout.rows, rows), layout.size](
        x,
        blocks.view(torch.float8_e4m3fn),
        blocks.view(torch.float32),
        layout.rows,
        layout.tokens,
        layout.width,
        layout.block_stride,
        layout.row_stride,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4 if columns <= TILE else 8,
    )
