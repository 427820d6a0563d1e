"""What the tests need beside the formats of the GPU checks: float weights, and SGLang's experts."""

from __future__ import annotations

from typing import Any

import torch
from quantized_kernels import awq_dequantize, from_fp4, unpack
from sglang_shift.tools.gpu_check.formats import EACH, FORMATS, GROUP, Checkpoint, Format, Sizes, plain

SIZES = Sizes()


def dense(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float64 weight ``[n, k]`` that the tensors of a checkpoint stand for."""
    t = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    if "g_idx" in t:
        numbers = unpack(t["qweight"]).transpose(1, 2).flatten(0, 1) - 8
        return (numbers * t["scales"][t["g_idx"].long()]).t()
    if "qweight" in t:
        return awq_dequantize(t["qweight"], t["scales"], t["qzeros"]).t()
    if "weight_packed" in t:
        numbers = unpack(t["weight_packed"]).flatten(1) - 8
        return numbers * t["weight_scale"].repeat_interleave(GROUP, 1)
    if "weight_scale_2" in t:
        return from_fp4(t["weight"], t["weight_scale"]) * t["weight_scale_2"]
    weight = t["weight"].double()
    scale = t.get("weight_scale_inv", t.get("weight_scale", torch.ones(())))
    if scale.dim() == 2:
        scale = scale.repeat_interleave(len(weight) // len(scale), 0)
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return weight * scale


EXPERTS, TOP_K, EXPERT_SIZE = 4, 2, 256
EXPERT_FORMATS: dict[str, Format] = {
    "unquantized": Format(lambda: None, plain, EACH, torch.float32),
    "fp8, per tensor, dynamic": FORMATS["fp8, per tensor, dynamic"],
    "fp8, per tensor, static": FORMATS["fp8, per tensor, static"],
    "fp8, blocks of 64": FORMATS["fp8, blocks of 64"],
}


def build_experts(fmt: Format, seed: int = 0) -> Any:
    """SGLang's experts, loaded and processed. SGLang's settings must be published."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    layer = FusedMoE(
        EXPERTS, SIZES.hidden, EXPERT_SIZE, layer_id=0, top_k=TOP_K, params_dtype=fmt.dtype, quant_config=fmt.config(),
        prefix="layers.0.mlp.experts",
    )  # fmt: skip
    maker = Checkpoint(seed)
    shapes = {"w1": (EXPERT_SIZE, SIZES.hidden), "w3": (EXPERT_SIZE, SIZES.hidden), "w2": (SIZES.hidden, EXPERT_SIZE)}
    for expert in range(EXPERTS):
        for part, (n, k) in shapes.items():
            for name, tensor in fmt.tensors(maker, n, k).items():
                parameter = getattr(layer, f"w{'2' if part == 'w2' else '13'}_{name}")
                parameter.weight_loader(parameter, tensor, f"experts.{expert}.{part}.{name}", part, expert)
    layer.quant_method.process_weights_after_loading(layer)
    return layer
