"""Defines packing and unpacking in plain PyTorch, on any device. The kernels give the same results, bit by bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang_shift_kernels.layout import SCALE_BYTES, Layout, check_quantizable, is_quantized

SMALLEST = 2.0**-100
"""If a row's largest element is smaller, the row is scaled as if its largest element were this. It may become zeros."""
EXPONENT_BITS = 0x7F800000
"""The bits of a float32's exponent. Alone, they are the largest power of two that is not above the number."""
HEADROOM = 2.0**-7
"""Factor that brings the largest element of a scaled row into [128, 256), below e4m3's largest value, 448."""


def pack_heads(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """``[n, S * D]`` to ``[S, n, D]``."""
    layout = Layout.by_heads(x, size)
    blocks = x.view(layout.rows, size, layout.width).transpose(0, 1)
    return quantize_blocks(blocks, layout) if quantize else blocks.contiguous()


def unpack_tokens(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[S, n, D]`` to ``[S * n, D]``."""
    return dequantize_if_needed(blocks, dtype).flatten(0, 1)


def pack_tokens(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """``[T, D]`` to ``[S, ceil(T / S), D]``, with zeros at the end."""
    layout = Layout.by_tokens(x, size)
    blocks = F.pad(x, (0, 0, 0, size * layout.rows - layout.tokens)).reshape(layout.shape)
    return quantize_blocks(blocks, layout) if quantize else blocks.contiguous()


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[S, n, D]`` to ``[n, S * D]``."""
    return dequantize_if_needed(blocks, dtype).transpose(0, 1).flatten(1)


def quantize_blocks(blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``[S, n, D]``, any strides, to ``[S, n, D + 16]`` bytes (:mod:`sglang_shift_kernels.fp8`)."""
    check_quantizable(blocks, layout)
    x = blocks.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    scale = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32) * HEADROOM
    elements = (x / scale).to(torch.float8_e4m3fn)
    scales = scale.repeat(1, 1, SCALE_BYTES // 4)
    return torch.cat([elements.view(torch.uint8), scales.view(torch.uint8)], -1)


def dequantize_if_needed(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Undo :func:`quantize_blocks`, except for its error. Other blocks do not change."""
    if not is_quantized(blocks, dtype):
        return blocks
    elements = blocks[..., :-SCALE_BYTES].view(torch.float8_e4m3fn)
    scale = blocks.view(torch.float32)[..., -1:]
    return (elements.float() * scale).to(dtype)
