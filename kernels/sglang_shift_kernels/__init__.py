"""Packs and unpacks the blocks of the exchange around attention: with Triton on a GPU, and with PyTorch elsewhere.

The Ulysses exchange (arXiv 2309.14509) is an all-to-all in each direction. Before an all-to-all, each rank packs S
blocks, one for each rank. After it, the rank unpacks S blocks, one from each rank, to rows:

    scatter heads: pack_heads,  all-to-all, unpack_tokens
    gather heads:  pack_tokens, all-to-all, unpack_heads

With ``fp8``, the blocks are packed as bytes of e4m3, and each row of each block has a scale. They take about half of
the bytes of bfloat16 (:mod:`sglang_shift_kernels.fp8`, which also states the error).
"""

from __future__ import annotations

from types import ModuleType

import torch

from sglang_shift_kernels import cpu


def pack_heads(x: torch.Tensor, size: int, *, fp8: bool = False) -> torch.Tensor:
    """Pack the columns of each rank as one block.

    Args:
        x: ``[n, S * D]``, strides ``(any, 1)``. These are this rank's tokens, and column block s is for rank s.
        size: S.
        fp8: Whether to quantize. D must then be a multiple of 16.

    Returns:
        ``[S, n, D]``, contiguous; with ``fp8`` ``[S, n, D + 16]`` bytes. The result is a view of ``x`` if ``x`` already
        has the blocks, as a single row has.

    Raises:
        ValueError: ``x`` cannot be packed in this way.
    """
    return _implementation(x).pack_heads(x, size, fp8)


def unpack_tokens(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Join the blocks one after the other: all tokens, and this rank's columns. This undoes :func:`pack_tokens`.

    Args:
        blocks: ``[S, n, D]``, contiguous, or ``[S, n, D + 16]`` bytes. Block s has the tokens of rank s.
        dtype: Type of the rows that were packed.

    Returns:
        ``[S * n, D]``, contiguous. The result is a view of the blocks unless they were quantized.

    Raises:
        ValueError: the blocks are not blocks of ``dtype``.
    """
    return _implementation(blocks).unpack_tokens(blocks, dtype)


def pack_tokens(x: torch.Tensor, size: int, *, fp8: bool = False) -> torch.Tensor:
    """Pack the tokens of each rank as one block, and pad the last blocks with zeros.

    Args:
        x: ``[T, D]``, strides ``(any, 1)``. These are all tokens, and this rank's columns.
        size: S.
        fp8: Whether to quantize. D must then be a multiple of 16.

    Returns:
        ``[S, ceil(T / S), D]``, contiguous; with ``fp8`` ``[S, ceil(T / S), D + 16]`` bytes. The result is a view of
        ``x`` if ``x`` already has the blocks: if it is contiguous, and T is a multiple of S.

    Raises:
        ValueError: ``x`` cannot be packed in this way.
    """
    return _implementation(x).pack_tokens(x, size, fp8)


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Join the blocks side by side: this rank's tokens, and the columns of all ranks. This undoes :func:`pack_heads`.

    Args:
        blocks: ``[S, n, D]``, contiguous, or ``[S, n, D + 16]`` bytes. Block s has the columns of rank s.
        dtype: Type of the rows that were packed.

    Returns:
        ``[n, S * D]``, contiguous. The result is a view of the blocks if they already have the rows.

    Raises:
        ValueError: the blocks are not blocks of ``dtype``.
    """
    return _implementation(blocks).unpack_heads(blocks, dtype)


def fp8_supported(device: torch.device) -> bool:
    """Return whether a device can quantize blocks: CPUs can, and NVIDIA GPUs of compute capability 8.9 or more can.

    Older GPUs have no instruction that makes e4m3, and Triton refuses to compile the kernel for them.
    """
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def _implementation(x: torch.Tensor) -> ModuleType:
    if not x.is_cuda:
        return cpu
    from sglang_shift_kernels import gpu  # if there is CUDA, there is Triton

    return gpu
