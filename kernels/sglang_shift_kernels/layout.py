"""The places of an exchange's blocks in a matrix of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALE_BYTES = 16
"""Bytes of a quantized row after its elements. They are four times the scale, so rows stay aligned to 16 bytes."""


@dataclass(frozen=True)
class Layout:
    """S blocks of ``rows`` rows and ``width`` columns in a matrix.

    Element (s, r, c) of the blocks is the matrix's element ``s * block_stride + r * row_stride + c``. This holds if
    ``s * rows + r < tokens``. All other elements of the blocks are padding.
    """

    size: int
    rows: int
    width: int
    block_stride: int
    row_stride: int
    tokens: int

    @classmethod
    def by_heads(cls, x: torch.Tensor, size: int) -> Layout:
        """Return the layout of blocks side by side in ``[n, S * D]``.

        Raises:
            ValueError: ``x`` has no such blocks.
        """
        _check(x, size)
        rows, columns = x.shape
        if columns % size:
            raise ValueError(f"{columns} columns cannot be packed for {size} ranks: they must be a multiple of that")
        width = columns // size
        return cls(size, rows, width, block_stride=width, row_stride=x.stride(0), tokens=size * rows)

    @classmethod
    def by_tokens(cls, x: torch.Tensor, size: int) -> Layout:
        """Return the layout of blocks one after the other in ``[T, D]``. The last blocks are padded.

        Raises:
            ValueError: ``x`` has no such blocks.
        """
        _check(x, size)
        tokens, width = x.shape
        rows = -(-tokens // size)
        return cls(size, rows, width, block_stride=rows * x.stride(0), row_stride=x.stride(0), tokens=tokens)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``[S, rows, width]``."""
        return self.size, self.rows, self.width

    @property
    def is_view(self) -> bool:
        """Whether the blocks are contiguous in the matrix, so nothing must be copied."""
        return (
            self.tokens == self.size * self.rows
            and (self.rows <= 1 or self.row_stride == self.width)
            and (self.size == 1 or self.block_stride == self.rows * self.width)
        )


def _check(x: torch.Tensor, size: int) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"a tensor of shape {list(x.shape)} and strides {list(x.stride())} cannot be packed: "
            "pass a matrix whose rows are contiguous"
        )
    if size < 1:
        raise ValueError(f"blocks cannot be packed for {size} ranks: pass the number of ranks of the group")


def check_quantizable(x: torch.Tensor, layout: Layout) -> None:
    """Check that rows of these blocks can be quantized.

    Raises:
        ValueError: the rows cannot be quantized.
    """
    if not x.is_floating_point() or layout.width % SCALE_BYTES:
        raise ValueError(
            f"blocks of {layout.width} columns of {x.dtype} cannot be sent as fp8: "
            f"it takes floating-point numbers in a multiple of {SCALE_BYTES} columns; turn fp8 off"
        )


def is_quantized(blocks: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether these are blocks of bytes; otherwise they are blocks of ``dtype``.

    Raises:
        ValueError: the blocks are neither.
    """
    if blocks.dim() != 3 or not blocks.is_contiguous() or blocks.dtype not in (torch.uint8, dtype):
        raise ValueError(
            f"a tensor of shape {list(blocks.shape)}, strides {list(blocks.stride())} and {blocks.dtype} cannot be "
            f"unpacked to {dtype}: pass the contiguous blocks that arrived and the type of the rows that were packed"
        )
    return blocks.dtype is torch.uint8
