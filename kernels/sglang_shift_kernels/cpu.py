"""Packs and unpacks without Triton, in the fastest way that PyTorch has on a CPU.

``python benchmark/kernels.py --device cpu`` measured the ways, and also has the slower ways. A function is imported
from the reference if no other way was faster.
"""

from __future__ import annotations

import torch

from sglang_shift_kernels import reference
from sglang_shift_kernels.layout import Layout
from sglang_shift_kernels.reference import pack_heads, unpack_tokens

__all__ = ["pack_heads", "pack_tokens", "unpack_heads", "unpack_tokens"]

FEW_ROWS = 8
"""Up to this number of rows, a call of ``cat`` takes longer than it saves."""


def pack_tokens(x: torch.Tensor, size: int, quantize: bool = False) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.pack_tokens`. Zeros are joined to ``x``: padding would write all rows twice."""
    layout = Layout.by_tokens(x, size)
    if not layout.is_view:
        x = torch.cat((x, x.new_zeros(size * layout.rows - layout.tokens, layout.width)))
    blocks = x.view(layout.shape)
    return reference.quantize_blocks(blocks, layout) if quantize else blocks


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See :func:`sglang_shift_kernels.unpack_heads`."""
    blocks = reference.dequantize_if_needed(blocks, dtype)
    if blocks.shape[1] <= FEW_ROWS:
        return blocks.transpose(0, 1).flatten(1)
    return torch.cat(blocks.unbind(), 1)
