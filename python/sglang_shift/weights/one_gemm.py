"""All columns of stacked shards as one shard, if their memory allows it.

Some methods keep a weight as ``[n, k]`` in memory, in which each row belongs to one output column, and read nothing
else than scales of these columns. Stacked, ``[S, n, k]`` is ``[S * n, k]`` without a copy, and one GEMM computes what S
GEMMs would: each output is the product of the same numbers. For all other methods there is a GEMM for each shard.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear

from sglang_shift.seams import relies_on
from sglang_shift.weights.layer_tensors import Shard, held_by, holds_tensors

METHODS = frozenset(
    (
        "UnquantizedLinearMethod",
        "Fp8LinearMethod",
        "W8A8Fp8LinearMethod",
        "W8A8Int8LinearMethod",
        "BlockInt8LinearMethod",
        "ModelOptFp8LinearMethod",
        "CompressedTensorsW8A8Fp8",
        "CompressedTensorsW8A8Int8",
    )
)
"""SGLang's methods, and schemes of compressed-tensors, that read the columns of a weight independently."""

SCALES = frozenset(("weight_scale", "weight_scale_inv", "input_scale"))
"""What these methods read beside the weight and the bias."""

DTYPES = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
)
"""Types of weights of which each element is one number. Packed and repacked weights have other types."""


QUANTIZATION = "sglang.srt.layers.quantization"
SCHEMES = f"{QUANTIZATION}.compressed_tensors.schemes"
READS_COLUMNS = "it reads only the weight, its scales and the bias, and each column independently"


@relies_on(f"{QUANTIZATION}.unquant:UnquantizedLinearMethod.apply", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.fp8:Fp8LinearMethod.apply", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.fp8_utils:apply_fp8_linear", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.w8a8_fp8:W8A8Fp8LinearMethod.apply", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.w8a8_int8:W8A8Int8LinearMethod.apply", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.blockwise_int8:BlockInt8LinearMethod.apply", READS_COLUMNS)
@relies_on(f"{QUANTIZATION}.modelopt_quant:ModelOptFp8LinearMethod.apply", READS_COLUMNS)
@relies_on(f"{SCHEMES}.compressed_tensors_w8a8_fp8:CompressedTensorsW8A8Fp8.apply_weights", READS_COLUMNS)
@relies_on(f"{SCHEMES}.compressed_tensors_w8a8_int8:CompressedTensorsW8A8Int8.apply_weights", READS_COLUMNS)
def side_by_side(layer: Any, shards: list[Shard]) -> Shard | None:
    """All columns of a layer as one shard, in the memory of the stacked shards.

    Args:
        layer: SGLang's layer, after ``process_weights_after_loading``.
        shards: Its shards, whose tensors lie in the memory of a stack.

    Returns:
        The shard of all columns, or None if a GEMM for each shard must run.
    """
    if not isinstance(layer, ColumnParallelLinear) or _method(layer) not in METHODS:
        return None
    whole = {}
    for name in held_by(shards[0]):
        parts = [getattr(shard, name) for shard in shards]
        tensor = _one_tensor(layer, name, parts)
        if tensor is None:
            return None
        whole[name] = tensor
    return Shard(layer, whole)


def _method(layer: Any) -> str:
    """The class that computes with the weight: that of the layer's scheme if it has one, or of its method."""
    if scheme := getattr(layer, "scheme", None):
        return type(scheme).__name__
    return next((cls.__name__ for cls in type(layer.quant_method).__mro__ if "apply" in vars(cls)), "")


def _one_tensor(layer: Any, name: str, parts: list[Any]) -> torch.Tensor | None:
    """The tensor of this name for all columns; None if there is none without a copy."""
    first = parts[0]
    columns = layer.output_size_per_partition
    if not isinstance(first, torch.Tensor) or any(map(holds_tensors, vars(first).values())):
        return None
    if first.numel() == 1 and name in SCALES:  # a scale of the whole tensor: all shards must have the same
        return first if all(torch.equal(part, first) for part in parts) else None
    if name == "weight":
        dim = 0 if first.is_contiguous() else 1
        usable = _is_plain_matrix(first, columns, dim)
    elif name == "bias":
        dim, usable = 0, first.shape == (columns,)
    elif name in SCALES:
        # Scales of blocks may be as many as the columns, [n / b, k / b], so only their rows tell what they are.
        rows = first.shape[0] * (1 if first.shape[0] == columns else _block_rows(layer))
        dim, usable = 0, rows == columns and first.dtype == torch.float32 and first.is_contiguous()
    else:
        return None
    return _concatenation(parts, dim) if usable else None


def _is_plain_matrix(weight: torch.Tensor, columns: int, dim: int) -> bool:
    """Whether the memory is ``[n, k]``, each element is one weight, and nothing is shuffled."""
    rows = weight if dim == 0 else weight.t()
    plain = weight.dtype in DTYPES and weight.dim() == 2 and not getattr(weight, "is_shuffled", False)
    return plain and rows.is_contiguous() and rows.shape[0] == columns


def _block_rows(layer: Any) -> int:
    """How many output columns share a scale; 0 if the method has no blocks."""
    method = getattr(layer, "scheme", None) or layer.quant_method
    holders = (method, getattr(method, "quant_config", None))
    blocks = [getattr(holder, "weight_block_size", None) for holder in holders]
    return next((block[0] for block in blocks if block), 0)


def _concatenation(parts: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    """The concatenation of ``parts`` as a view, if each part begins in memory where the part before it ends."""
    first = parts[0]
    step = first.shape[dim] * first.stride(dim)
    if any(part.storage_offset() != first.storage_offset() + j * step for j, part in enumerate(parts)):
        return None
    shape = list(first.shape)
    shape[dim] *= len(parts)
    view = first.as_strided(shape, first.stride())
    view.__dict__.update(vars(first))
    return view
