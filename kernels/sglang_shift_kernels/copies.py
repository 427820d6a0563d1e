"""The Triton kernel that copies between rows and blocks. It moves integers, so a copy is exact for every type."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_shift_kernels.layout import Layout

TILE_ROWS = 16
TILE_ROW_BYTES = 512
"""Bytes that the 32 threads of a warp load at once, 16 bytes each."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# `rows` and `tokens` change from step to step, so a multiple of 16 or a 1 must not compile a new kernel.
@triton.jit(do_not_specialize=["rows", "tokens"])
def copy_kernel(
    x: tl.tensor,
    blocks: tl.tensor,
    rows: int,
    tokens: int,
    width: int,
    block_stride: int,
    row_stride: int,
    TO_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Copy one tile of one block, between its place in ``x`` and its place in ``blocks``.

    Args:
        x: A matrix. Element (s, r, c) of the blocks is at ``s * block_stride + r * row_stride + c``.
        blocks: ``[S, rows, width]``, contiguous.
        rows, tokens, width, block_stride, row_stride: As in :class:`Layout`.
        TO_BLOCKS: The direction. Padding is written to the blocks as zeros, and is not written to ``x``.
        ROWS, COLUMNS: Rows and columns of a tile. The grid is (tiles in a row, tiles in a column, S).
    """
    block = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row_of_all = block * rows + row
    in_blocks = (row < rows) & (column < width)
    in_x = in_blocks & (row_of_all < tokens)
    x += block * block_stride + row.to(tl.int64) * row_stride + column
    blocks += row_of_all * width + column
    if TO_BLOCKS:
        tl.store(blocks, tl.load(x, in_x, other=0), in_blocks)
    else:
        tl.store(x, tl.load(blocks, in_x), in_x)


def to_blocks(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Copy ``x`` to new blocks.

    Returns:
        ``[S, rows, width]``, contiguous, with zeros if ``x`` has no such row.
    """
    blocks = torch.empty(layout.shape, dtype=x.dtype, device=x.device)
    _launch(x, blocks, layout, to_blocks=True)
    return blocks


def to_rows(blocks: torch.Tensor, x: torch.Tensor, layout: Layout) -> None:
    """Copy blocks ``[S, rows, width]``, contiguous, to their places in ``x``."""
    _launch(x, blocks, layout, to_blocks=False)


def _launch(x: torch.Tensor, blocks: torch.Tensor, layout: Layout, to_blocks: bool) -> None:
    integer = INTEGERS[x.element_size()]
    columns = min(TILE_ROW_BYTES // x.element_size(), triton.next_power_of_2(layout.width))
    grid = (triton.cdiv(layout.width, columns), triton.cdiv(layout.rows, TILE_ROWS), layout.size)
    copy_kernel[grid](
        x.view(integer),
        blocks.view(integer),
        layout.rows,
        layout.tokens,
        layout.width,
        layout.block_stride,
        layout.row_stride,
        TO_BLOCKS=to_blocks,
        ROWS=TILE_ROWS,
        COLUMNS=columns,
    )
