"""Packing and unpacking for the exchange around attention: Triton on a GPU, PyTorch elsewhere.

The Ulysses exchange (arXiv 2309.14509) is an all-to-all in either direction. Before each one S blocks are
made, one for each rank, and after it S blocks, one from each rank, become rows again:

    scatter heads: pack_heads,  all-to-all, unpack_tokens
    gather heads:  pack_tokens, all-to-all, unpack_heads

With ``fp8`` the blocks are packed as bytes of e4m3 with a scale for each row of each block: about half of
what bfloat16 takes (:mod:`sglang_shift_kernels.fp8`, which also says what error that makes).
"""

from __future__ import annotations

from types import ModuleType

import torch

from sglang_shift_kernels import cpu


def pack_heads(x: torch.Tensor, size: int, *, fp8: bool = False) -> torch.Tensor:
    """The columns of each rank as one block.

    Args:
        x: ``[n, S * D]``, strides ``(any, 1)``: this rank's tokens; column block s is for rank s.
        size: S.
        fp8: Whether to quantize; D must then be a multiple of 16.

    Returns:
        ``[S, n, D]``, contiguous; with ``fp8`` ``[S, n, D + 16]`` bytes. ``x``'s own memory where that is
        such blocks already, as one row is.

    Raises:
        ValueError: ``x`` cannot be packed so.
    """
    return _implementation(x).pack_heads(x, size, fp8)


def unpack_tokens(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The blocks one after the other: all tokens, this rank's columns. Undoes :func:`pack_tokens`.

    Args:
        blocks: ``[S, n, D]``, contiguous, or ``[S, n, D + 16]`` bytes: block s has the tokens of rank s.
        dtype: Of the rows that were packed.

    Returns:
        ``[S * n, D]``, contiguous; the blocks' own memory unless they were quantized.

    Raises:
        ValueError: These are no blocks of ``dtype``.
    """
    return _implementation(blocks).unpack_tokens(blocks, dtype)


def pack_tokens(x: torch.Tensor, size: int, *, fp8: bool = False) -> torch.Tensor:
    """The tokens of each rank as one block, the last ones padded with zeros.

    Args:
        x: ``[T, D]``, strides ``(any, 1)``: all tokens, this rank's columns.
        size: S.
        fp8: Whether to quantize; D must then be a multiple of 16.

    Returns:
        ``[S, ceil(T / S), D]``, contiguous; with ``fp8`` ``[S, ceil(T / S), D + 16]`` bytes. ``x``'s own
        memory where that is such blocks already: contiguous, and T a multiple of S.

    Raises:
        ValueError: ``x`` cannot be packed so.
    """
    return _implementation(x).pack_tokens(x, size, fp8)


def unpack_heads(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The blocks side by side: this rank's tokens, the columns of all ranks. Undoes :func:`pack_heads`.

    Args:
        blocks: ``[S, n, D]``, contiguous, or ``[S, n, D + 16]`` bytes: block s has the columns of rank s.
        dtype: Of the rows that were packed.

    Returns:
        ``[n, S * D]``, contiguous; the blocks' own memory where that is such rows already.

    Raises:
        ValueError: These are no blocks of ``dtype``.
    """
    return _implementation(blocks).unpack_heads(blocks, dtype)


def fp8_supported(device: torch.device) -> bool:
    """Whether blocks can be quantized there: on a CPU, and on NVIDIA GPUs from compute capability 8.9 on.

    Older ones have no instruction that makes e4m3, and Triton refuses to compile the kernel for them.
    """
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def _implementation(x: torch.Tensor) -> ModuleType:
    if not x.is_cuda:
        return cpu
    from sglang_shift_kernels import gpu  # Triton is there where CUDA is

    return gpu
