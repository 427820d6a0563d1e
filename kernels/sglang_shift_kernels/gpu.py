"""Packs and unpacks with Triton kernels: in one pass over the data, or with a view if a view is enough."""

from __future__ import annotations

import torch

from sglang_shift_kernels import copies, fp8
from sglang_shift_kernels.layout import SCALE_BYTES, Layout, check_quantizable, is_quantized


def pack_heads(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.pack_heads`."""
    return _pack(x, Layout.by_heads(x, size), quantize)


def unpack_tokens(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.unpack_tokens`."""
    if not is_quantized(blocks, dtype):
        return blocks.flatten(0, 1)
    size, rows, width = blocks.shape
    x = torch.empty((size * rows, width - SCALE_BYTES), dtype=dtype, device=blocks.device)
    fp8.dequantize(blocks, x, Layout.by_tokens(x, size))
    return x


def pack_tokens(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.pack_tokens`."""
    return _pack(x, Layout.by_tokens(x, size), quantize)


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.unpack_heads`."""
    quantized = is_quantized(blocks, dtype)
    size, rows, width = blocks.shape
    if not quantized and 1 in (size, rows):
        return blocks.view(rows, size * width)
    x = torch.empty((rows, size * (width - SCALE_BYTES * quantized)), dtype=dtype, device=blocks.device)
    (fp8.dequantize if quantized else copies.to_rows)(blocks, x, Layout.by_heads(x, size))
    return x


def _pack(x: torch.Tensor, layout: Layout, quantize: bool) -> torch.Tensor:
    if quantize:
        check_quantizable(x, layout)
        return fp8.quantize_blocks(x, layout)
    return x.view(layout.shape) if layout.is_view else copies.to_blocks(x, layout)
