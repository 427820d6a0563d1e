"""Triton kernels that quantize while packing and dequantize while unpacking.

A row of a block of D columns travels as D + 16 bytes: D elements in e4m3 (a sign, 4 bits of exponent, 3 of
mantissa; OCP 8-bit Floating Point Specification, revision 1.0) and their scale in float32, four times.

The scale is the power of two that brings the row's largest element into [128, 256). So scaling is exact, and the
one error is e4m3's rounding to the nearest: an element comes back within 1/16 of itself, or within 2^-17 of the
largest of its row and block where it is smaller than 2^-13 of that. bfloat16 needs no rounding on top, and float16
only below 2^-14; but in float16 what is 63,488 or more comes back as infinity. NaN
stays NaN, and an infinity does not become a number; the other elements of such a row mean nothing.
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
"""Taken from the bits of a power of two, this divides it by 128."""
RECIPROCAL_BITS = tl.constexpr(254 << 23)
"""From this the bits of a power of two are taken to get those of its reciprocal."""
SCALE_FLOATS = tl.constexpr(SCALE_BYTES // 4)
TILE = 2048
"""Elements of a tile, in whole rows, or one row if that has more."""


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
    """Some whole rows of one block: from ``x``, padded with zeros, to bytes.

    Args:
        x: A matrix of floating-point numbers, as for :func:`copies.copy_kernel`.
        elements: ``[S, rows, width + 16]`` as e4m3, contiguous: a row's elements are the first ``width``.
        scales: The same memory as float32, ``[S, rows, width / 4 + 4]``: a row's scale is the last four.
        rows, tokens, width, block_stride, row_stride: As in :class:`Layout`; ``width`` is a multiple of 16.
        ROWS, COLUMNS: Of a tile; ``COLUMNS >= width``. The grid is (tiles in a column, S).
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
    # Not `RECIPROCAL_BITS - scale`: a constant to the left of a tensor makes Triton 3.8's interpreter fail.
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
    """Some whole rows of one block: from bytes to ``x``. The arguments are those of :func:`quantize_kernel`."""
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


def quantized(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The blocks of ``x`` as bytes.

    Returns:
        ``[S, rows, width + 16]``, contiguous.
    """
    blocks = torch.empty((layout.size, layout.rows, layout.width + SCALE_BYTES), dtype=torch.uint8, device=x.device)
    _launch(quantize_kernel, x, blocks, layout)
    return blocks


def dequantize(blocks: torch.Tensor, x: torch.Tensor, layout: Layout) -> None:
    """Write what :func:`quantized` made, ``[S, rows, width + 16]``, to its places in ``x``."""
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
