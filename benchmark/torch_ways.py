"""Other ways to pack and unpack in PyTorch, for benchmark/kernels.py. sglang_shift_kernels.cpu has the chosen ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from sglang_shift_kernels.layout import SCALE_BYTES
from sglang_shift_kernels.reference import EXPONENT_BITS, HEADROOM, SMALLEST

Largest = Callable[[torch.Tensor], torch.Tensor]


def split(x: torch.Tensor, size: int) -> torch.Tensor:
    return x.view(x.shape[0], size, -1).transpose(0, 1)


def pack_heads_contiguous(x: torch.Tensor, size: int) -> torch.Tensor:
    return split(x, size).contiguous()


def pack_heads_stack(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack(x.chunk(size, 1))


def pack_heads_each(x: torch.Tensor, size: int) -> torch.Tensor:
    blocks = x.new_empty(size, x.shape[0], x.shape[1] // size)
    for block, part in zip(blocks, x.chunk(size, 1), strict=True):
        block.copy_(part)
    return blocks


def unpack_heads_flatten(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return blocks.transpose(0, 1).flatten(1)


def unpack_heads_cat(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(blocks.unbind(), 1)


def unpack_heads_each(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = blocks.new_empty(blocks.shape[1], blocks.shape[0] * blocks.shape[2])
    for block, part in zip(blocks, x.chunk(len(blocks), 1), strict=True):
        part.copy_(block)
    return x


def rows_for(x: torch.Tensor, size: int) -> int:
    return -(-x.shape[0] // size) * size


def pack_tokens_cat(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat((x, x.new_zeros(rows_for(x, size) - x.shape[0], x.shape[1]))).view(size, -1, x.shape[1])


def pack_tokens_pad(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, rows_for(x, size) - x.shape[0])).view(size, -1, x.shape[1])


def pack_tokens_empty(x: torch.Tensor, size: int) -> torch.Tensor:
    blocks = x.new_empty(rows_for(x, size), x.shape[1])
    blocks[: len(x)].copy_(x)
    blocks[len(x) :].zero_()
    return blocks.view(size, -1, x.shape[1])


def by_abs(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True)


def by_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)


def by_aminmax(x: torch.Tensor) -> torch.Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    return torch.maximum(-low, high)


def quantize(pack: Callable[..., torch.Tensor], largest: Largest, x: torch.Tensor, size: int, *_: bool) -> torch.Tensor:
    """Quantize as the reference does, but find a row's largest element by ``largest``, and write each part in place."""
    blocks = pack(x, size).float()
    scale = (largest(blocks).clamp_min(SMALLEST).view(torch.int32) & EXPONENT_BITS).view(torch.float32) * HEADROOM
    result = torch.empty(*blocks.shape[:2], blocks.shape[2] + SCALE_BYTES, dtype=torch.uint8)
    result[..., :-SCALE_BYTES].view(torch.float8_e4m3fn).copy_(blocks / scale)
    result.view(torch.float32)[..., -SCALE_BYTES // 4 :] = scale
    return result


def dequantize(unpack: Callable[..., torch.Tensor], blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize as the reference does, but in the rows' own type. This is exact, as the scale is a power of two."""
    elements = blocks[..., :-SCALE_BYTES].view(torch.float8_e4m3fn).to(dtype)
    return unpack(elements * blocks.view(torch.float32)[..., -1:].to(dtype), dtype)


def flat(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return blocks.flatten(0, 1)


LARGEST = {"written in place, abs": by_abs, "norm": by_norm, "aminmax": by_aminmax}
WAYS: dict[str, dict[str, Callable[..., torch.Tensor]]] = {
    "pack heads": {"contiguous": pack_heads_contiguous, "stack": pack_heads_stack, "each": pack_heads_each},
    "pack tokens": {"cat": pack_tokens_cat, "pad": pack_tokens_pad, "empty": pack_tokens_empty},
    "unpack heads": {"flatten": unpack_heads_flatten, "cat": unpack_heads_cat, "each": unpack_heads_each},
    "pack heads, fp8": {name: partial(quantize, split, largest) for name, largest in LARGEST.items()},
    "pack tokens, fp8": {name: partial(quantize, pack_tokens_cat, largest) for name, largest in LARGEST.items()},
    "unpack tokens, fp8": {"in the rows' type": partial(dequantize, flat)},
    "unpack heads, fp8": {"in the rows' type": partial(dequantize, unpack_heads_cat)},
}
