"""Packing and unpacking without Triton: of the ways that PyTorch has, the fastest on a CPU.

Which one that is was measured by ``python benchmark/kernels.py --device cpu``; the others are there. What is
imported as it is from the reference was the fastest, or as fast as any other.
"""

from __future__ import annotations

import torch

from sglang_shift_kernels import reference
from sglang_shift_kernels.layout import Layout
from sglang_shift_kernels.reference import pack_heads, unpack_tokens

__all__ = ["pack_heads", "pack_tokens", "unpack_heads", "unpack_tokens"]

FEW_ROWS = 8
"""Up to so many, the call of ``cat`` takes longer than it saves."""


def pack_tokens(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.pack_tokens`. Joined with zeros: padding would write all rows twice."""
    layout = Layout.by_tokens(x, size)
    if not layout.is_view:
        x = torch.cat((x, x.new_zeros(size * layout.rows - layout.tokens, layout.width)))
    blocks = x.view(layout.shape)
    return reference.quantized(blocks, layout) if quantize else blocks


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.unpack_heads`."""
    blocks = reference.plain(blocks, dtype)
    if blocks.shape[1] <= FEW_ROWS:
        return blocks.transpose(0, 1).flatten(1)
    return torch.cat(blocks.unbind(), 1)
