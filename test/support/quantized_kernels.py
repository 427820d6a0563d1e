"""References of SGLang's quantized kernels, for tests on a machine without a GPU.

SGLang creates, loads and processes its weights itself. Only the kernels are replaced, by functions of the same
signature. All sums are float64. FP8, FP4 and INT8 products have so few bits that such a sum is exact, and the other
sums are rounded to a type with half as many bits. So a row of a result does not depend on the rows beside it.

A repacked weight has the shape and type that the kernel gives it, but its elements are in an order of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from sglang_shift.tools.gpu_check.formats import FP8, pack

FP8_MAX, INT8_MAX, FP4_MAX = 448.0, 127.0, 6.0
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the column of each 4-bit number of an int32


def product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T`` of two float64 matrices."""
    out = x @ weight.t()
    return (out if bias is None else out + bias.double()).to(dtype)


# FP8


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def sgl_per_tensor_quant_fp8(input: Any, output_q: Any, output_s: Any, is_static: bool) -> None:
    if not is_static:
        output_s.copy_(input.float().abs().max().clamp(min=1e-10) / FP8_MAX)
    output_q[: len(input)].copy_(to_fp8(input, output_s))


def sgl_per_token_quant_fp8(input: Any, output_q: Any, output_s: Any) -> None:
    output_s.copy_(input.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX)
    output_q.copy_(to_fp8(input, output_s))


def static_quant_fp8(x: Any, x_s: Any, repeat_scale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.is_contiguous() and x_s.numel() == 1
    return to_fp8(x, x_s), x_s.reshape(1, 1).repeat(len(x), 1) if repeat_scale else x_s


def per_token_group_quant_fp8(x: Any, group_size: int, eps: float = 1e-10, **layout: Any) -> Any:
    assert x.is_contiguous()
    groups = x.float().view(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=eps) / FP8_MAX
    return to_fp8(groups, scale).view(x.shape), scale.squeeze(-1)


def fp8_scaled_mm(mat_a: Any, mat_b: Any, scales_a: Any, scales_b: Any, out_dtype: Any, bias: Any = None) -> Any:
    assert mat_a.is_contiguous() and mat_b.t().is_contiguous(), "CUTLASS wants row-major times column-major"
    assert scales_a.numel() == len(mat_a) and scales_b.numel() == mat_b.shape[1]
    assert mat_b.data_ptr() % 16 == 0 and scales_b.is_contiguous()
    x = mat_a.double() * scales_a.double().reshape(-1, 1)
    return product(x, mat_b.t().double() * scales_b.double().reshape(-1, 1), out_dtype, bias)


def w8a8_block_matmul(A: Any, B: Any, As: Any, Bs: Any, block_size: Any, output_dtype: Any = torch.float16) -> Any:
    """Multiply FP8 or INT8 with a scale for each block."""
    assert B.is_contiguous() and Bs.is_contiguous() and A.is_contiguous()
    rows, columns = block_size
    scale = Bs.double().repeat_interleave(rows, 0)[: B.shape[0]].repeat_interleave(columns, 1)[:, : B.shape[1]]
    x = A.double() * As.double().repeat_interleave(columns, 1)[:, : A.shape[1]]
    return product(x, B.double() * scale, output_dtype, None)


# INT8


def per_token_quant_int8(x: Any, scale_dtype: Any = torch.float32, cal_sum: bool = False) -> Any:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / INT8_MAX
    return (x.float() / scale).round().to(torch.int8), scale.to(scale_dtype)


def per_token_group_quant_int8(x: Any, group_size: int, eps: float = 1e-10, dtype: Any = torch.int8) -> Any:
    groups = x.float().view(*x.shape[:-1], -1, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=eps) / INT8_MAX
    return (groups / scale).round().to(dtype).view(x.shape), scale.squeeze(-1)


def int8_scaled_mm(mat_a: Any, mat_b: Any, scales_a: Any, scales_b: Any, out_dtype: Any, bias: Any = None) -> Any:
    return fp8_scaled_mm(mat_a, mat_b, scales_a, scales_b, out_dtype, bias)


# AWQ and Marlin


def unpack(packed: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The numbers in each int32, from the lowest bits on, as one more dimension."""
    shifts = torch.arange(0, 32, bits)
    return (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)


def awq_columns(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of AWQ's packed columns, in the order of the columns."""
    return unpack(packed)[..., AWQ_ORDER].flatten(-2)


def awq_dequantize(qweight: Any, scales: Any, qzeros: Any) -> torch.Tensor:
    assert qweight.is_contiguous() and scales.is_contiguous() and qzeros.is_contiguous()
    group = len(qweight) // len(scales)
    zeros, scale = (t.repeat_interleave(group, 0) for t in (awq_columns(qzeros), scales))
    return (awq_columns(qweight) - zeros).to(scales.dtype) * scale


def marlin_tiles(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """``[k, n]`` numbers to the ``[k / 16, n * 16]`` numbers of Marlin's tiles, packed."""
    k, n = weight.shape
    return pack(weight.view(k // 16, 16, n).transpose(1, 2).reshape(k // 16, -1, 32 // bits), bits)


def from_marlin_tiles(packed: torch.Tensor, k: int, n: int, bits: int) -> torch.Tensor:
    return unpack(packed, bits).reshape(k // 16, n, 16).transpose(1, 2).reshape(k, n)


def awq_marlin_repack(qweight: Any, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    return marlin_tiles(awq_columns(qweight), num_bits)


def gptq_marlin_repack(qweight: Any, perm: Any, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
    numbers = unpack(qweight, num_bits).transpose(1, 2).reshape(size_k, size_n)
    return marlin_tiles(numbers[perm.long()] if perm.numel() else numbers, num_bits)


def marlin_make_workspace(device: Any, max_blocks_per_sm: int = 1) -> torch.Tensor:
    return torch.zeros(132 * max_blocks_per_sm, dtype=torch.int, device=device)


def without_permutation(permuted: torch.Tensor, grouped: bool) -> torch.Tensor:
    """Undo SGLang's permutation of Marlin's scales."""
    from sglang.srt.layers.quantization.marlin_utils import get_scale_perms

    order = torch.tensor(get_scale_perms()[0 if grouped else 1])
    return permuted.reshape(-1, len(order))[:, order.argsort()].reshape(permuted.shape)


def gptq_marlin_gemm(
    a: Any, c: Any, b_q_weight: Any, b_scales: Any, global_scale: Any, b_zeros: Any, g_idx: Any, perm: Any,
    workspace: Any, b_q_type: Any, size_m: int, size_n: int, size_k: int, is_k_full: bool = True, **options: Any,
) -> torch.Tensor:  # fmt: skip
    assert b_q_weight.is_contiguous() and b_scales.is_contiguous() and not workspace.any()
    bits = b_q_type.size_bits
    numbers = from_marlin_tiles(b_q_weight, size_k, size_n, bits)
    scales = without_permutation(b_scales, len(b_scales) > 1)
    group = torch.arange(size_k) * len(scales) // size_k if g_idx is None or not g_idx.numel() else g_idx.long()
    if b_zeros is not None and b_zeros.numel():
        undo = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).argsort()
        zeros = unpack(b_zeros, bits)[..., undo].reshape(len(b_zeros), size_n)
        zeros = without_permutation(zeros, True)[group]
    else:
        zeros = 2 ** (bits - 1)
    weight = (numbers - zeros).double() * scales[group].double()
    x = a[:, perm.long()] if perm is not None and perm.numel() else a
    return product(x.double(), weight.t(), a.dtype, None)


# Experts


def fused_experts(
    hidden_states: Any, w1: Any, w2: Any, topk_output: Any, moe_runner_config: Any, w1_scale: Any = None,
    w2_scale: Any = None, a1_scale: Any = None, a2_scale: Any = None, block_shape: Any = None,
    use_fp8_w8a8: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Run experts with a gate, row by row. A dynamic scale of the whole tensor is that of the rows of this call."""
    assert use_fp8_w8a8 and w1.is_contiguous() and w2.is_contiguous()
    weights, experts, _ = topk_output
    rows = hidden_states.repeat_interleave(experts.shape[1], 0)
    chosen = experts.flatten().long()
    gate, up = expert_product(rows, w1, w1_scale, a1_scale, block_shape, chosen).chunk(2, dim=-1)
    inner = (torch.nn.functional.silu(gate.float()) * up.float()).to(hidden_states.dtype)
    out = expert_product(inner, w2, w2_scale, a2_scale, block_shape, chosen)
    summed = (out.double() * weights.double().view(-1, 1)).view(*experts.shape, -1).sum(1).to(hidden_states.dtype)
    return hidden_states.copy_(summed) if moe_runner_config.inplace else summed


def expert_product(x: Any, weight: Any, scale: Any, x_scale: Any, block_shape: Any, chosen: Any) -> torch.Tensor:
    """Multiply each row with the FP8 weight of its expert."""
    if block_shape is None:
        x_scale = x.float().abs().max().clamp(min=1e-10) / FP8_MAX if x_scale is None else x_scale
        values = to_fp8(x, x_scale).double() * x_scale.double()
        dense = weight.double() * scale.double().view(-1, 1, 1)
    else:
        quantized, steps = per_token_group_quant_fp8(x.contiguous(), block_shape[1])
        values = quantized.double() * steps.double().repeat_interleave(block_shape[1], 1)
        dense = scale.double().repeat_interleave(block_shape[0], 1).repeat_interleave(block_shape[1], 2)
        dense = weight.double() * dense
    return torch.einsum("tk,tnk->tn", values, dense[chosen]).to(x.dtype)


# NVFP4


def unswizzled(scales: torch.Tensor) -> torch.Tensor:
    """Undo the interleaving of block scales in tiles of 128 rows and 4 columns."""
    rows, columns = scales.shape
    tiles = scales.view(torch.uint8).reshape(rows // 128, columns // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns).view(FP8)


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    padded = torch.zeros(rows, columns, dtype=torch.uint8)
    padded[: scales.shape[0], : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(FP8)


def fp4_quantize(x: Any, global_scale: Any, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.double().view(len(x), -1, 16)
    scale = (groups.abs().amax(-1) / FP4_MAX * global_scale.double()).float().to(FP8)
    step = (scale.double() / global_scale.double()).unsqueeze(-1)
    numbers = (groups / step.clamp(min=1e-30)).unsqueeze(-1).sub(FP4_VALUES).abs().argmin(-1).view(len(x), -1, 2)
    return (numbers[..., 0] | numbers[..., 1] << 4).to(torch.uint8), swizzled(scale)


def from_fp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[n, k / 2]`` pairs and their ``[n, k / 16]`` scales to float64."""
    numbers = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    scale = scales.double()[: len(packed)].repeat_interleave(16, 1)[:, : numbers.shape[1]]
    return FP4_VALUES[numbers] * scale


def fp4_gemm(
    input: Any, weight: Any, input_sf: Any, weight_sf: Any, alpha: Any, out_dtype: Any, out_features: int, *args: Any
) -> torch.Tensor:
    if weight.shape[0] * 2 == input.shape[1] * 2 and weight.stride(0) == 1:  # FlashInfer takes both transposed
        weight, weight_sf = weight.t(), weight_sf.t()
    assert weight.is_contiguous() and weight_sf.is_contiguous() and len(weight) == out_features
    x = from_fp4(input, unswizzled(input_sf))
    return product(x * alpha.double(), from_fp4(weight, unswizzled(weight_sf)), out_dtype, None)


# Installing them

QUANTIZATION = "sglang.srt.layers.quantization"
KERNELS: dict[str, Any] = {
    "sglang.kernels.ops.quantization.fp8_kernel:sgl_per_tensor_quant_fp8": sgl_per_tensor_quant_fp8,
    "sglang.kernels.ops.quantization.fp8_kernel:sgl_per_token_quant_fp8": sgl_per_token_quant_fp8,
    "sglang.kernels.ops.quantization.fp8_kernel:static_quant_fp8": static_quant_fp8,
    "sglang.kernels.ops.quantization.fp8_kernel:per_token_group_quant_fp8": per_token_group_quant_fp8,
    "sglang.kernels.ops.gemm.fp8_kernel:triton_scaled_mm": fp8_scaled_mm,
    "sglang.kernels.ops.gemm.fp8_kernel:w8a8_block_fp8_matmul_triton": w8a8_block_matmul,
    "sglang.kernels.ops.gemm.fp8_kernel:get_w8a8_channelwise_fp8_config": lambda N, K, M: None,
    f"{QUANTIZATION}.fp8_utils:fp8_scaled_mm": fp8_scaled_mm,
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe:fused_experts": fused_experts,
    "sglang.kernels.ops.quantization.int8_kernel:per_token_quant_int8": per_token_quant_int8,
    "sglang.kernels.ops.quantization.int8_kernel:per_token_group_quant_int8": per_token_group_quant_int8,
    "sglang.kernels.ops.gemm.int8_kernel:w8a8_block_int8_matmul": w8a8_block_matmul,
    f"{QUANTIZATION}.w8a8_int8:int8_scaled_mm": int8_scaled_mm,
    f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w8a8_int8:int8_scaled_mm": int8_scaled_mm,
    "sglang.srt.hardware_backend.gpu.quantization.awq_kernels:awq_dequantize": awq_dequantize,
    "sglang.srt.hardware_backend.gpu.quantization.awq_kernels:awq_marlin_repack": awq_marlin_repack,
    "sglang.srt.hardware_backend.gpu.quantization.gptq_kernels:gptq_marlin_repack": gptq_marlin_repack,
    f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16:gptq_marlin_repack": gptq_marlin_repack,
    f"{QUANTIZATION}.marlin_utils:gptq_marlin_gemm": gptq_marlin_gemm,
    f"{QUANTIZATION}.marlin_utils:marlin_make_workspace": marlin_make_workspace,
    f"{QUANTIZATION}.modelopt_quant:fp4_gemm": fp4_gemm,
    f"{QUANTIZATION}.fp4_utils:fp4_quantize": fp4_quantize,
}
"""Each kernel, under the name that SGLang imports or defines it by."""


def install(capability: tuple[int, int] = (8, 0)) -> None:
    """Replace the kernels, and let SGLang process weights as on a GPU. This is for the life of the process.

    The GPU is an H100, or a B200 if the format needs its compute capability.
    """
    for target, reference in KERNELS.items():
        replace(target, reference)
    replace_everywhere_below(QUANTIZATION, "get_device_capability", lambda *args: (9, 0))
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    utils = importlib.import_module(f"{QUANTIZATION}.fp8_utils")
    utils._is_cuda = True
    replace(f"{QUANTIZATION}.fp8_utils:cutlass_fp8_supported", lambda: True)
    # A default of this function was computed when SGLang was imported, for this machine.
    index = utils.apply_fp8_linear.__code__.co_varnames.index("cutlass_fp8_supported") - 3
    defaults = list(utils.apply_fp8_linear.__defaults__)
    defaults[index] = True
    utils.apply_fp8_linear.__defaults__ = tuple(defaults)
    use_scalar_types()
    if capability >= (10, 0):
        use_blackwell()


def use_blackwell() -> None:
    """Let SGLang process NVFP4 weights as on a B200. A copy to the GPU returns the tensor itself."""
    from sglang.srt.runtime_context import override_platform

    override_platform(is_blackwell=True).__enter__()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    importlib.import_module(f"{QUANTIZATION}.modelopt_quant").enable_flashinfer_fp4_gemm = True


def use_scalar_types() -> None:
    """Give SGLang the types of Marlin's weights. It finds none, because its package of kernels needs a GPU."""
    package = importlib.util.find_spec("sgl_kernel")
    assert package is not None and package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/scalar_type.py"
    spec = importlib.util.spec_from_file_location("scalar_type_of_sgl_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    types = module.scalar_types
    replace_everywhere_below("sglang", "scalar_types", types)
    awq = importlib.import_module(f"{QUANTIZATION}.awq.awq")
    awq.AWQMarlinConfig.TYPE_MAP = {4: types.uint4, 8: types.uint8}
    gptq = importlib.import_module(f"{QUANTIZATION}.gptq.gptq")
    gptq.GPTQMarlinConfig.TYPE_MAP = {(4, True): types.uint4b8, (8, True): types.uint8b128}
    scheme = importlib.import_module(f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16")
    scheme.WNA16_SUPPORTED_TYPES_MAP.update({4: types.uint4b8, 8: types.uint8b128})


def replace(target: str, reference: Callable[..., Any]) -> None:
    """Replace a function in its module, and in all modules of SGLang that have imported it."""
    module, name = target.split(":")
    original = getattr(importlib.import_module(module), name, None)
    setattr(sys.modules[module], name, reference)
    for other in modules_below("sglang"):
        if vars(other).get(name, reference) is original:
            setattr(other, name, reference)


def replace_everywhere_below(package: str, name: str, reference: Any) -> None:
    for module in modules_below(package):
        if name in vars(module):
            setattr(module, name, reference)


def modules_below(package: str) -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{package}.") and module]
