"""Random quantized checkpoints of single layers, and SGLang's layers that load them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from quantized_kernels import FP8, pack

HIDDEN, HEAD, HEADS, KV_HEADS, INTERMEDIATE = 256, 128, 8, 4, 1024
GROUP = 64  # of AWQ and GPTQ


class Checkpoint:
    """Makes the tensors of one weight of ``[n, k]``, as a checkpoint has them, by one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def scales(self, *shape: int) -> torch.Tensor:
        return (0.5 + torch.rand(*shape, generator=self.generator)) / 64

    def fp8(self, n: int, k: int) -> torch.Tensor:
        return (self.normal(n, k) * 100).clamp(-448, 448).to(FP8)


def plain(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    # These numbers have few bits, so a sum of their products is exact in float32, in any order.
    return {"weight": c.integers(-8, 9, n, k) / 8}


def fp8_tensor(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": c.fp8(n, k), "weight_scale": c.scales(1)[0]}


def fp8_static(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {**fp8_tensor(c, n, k), "input_scale": c.scales(1)[0]}


def fp8_channel(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": c.fp8(n, k), "weight_scale": c.scales(n, 1)}


def fp8_block(size: int, name: str = "weight_scale_inv") -> Callable[..., dict[str, torch.Tensor]]:
    return lambda c, n, k: {"weight": c.fp8(n, k), name: c.scales(-(-n // size), -(-k // size))}


def int8_channel(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {"weight": c.integers(-127, 128, n, k).to(torch.int8), "weight_scale": c.scales(n, 1)}


def int8_block(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {**int8_channel(c, n, k), "weight_scale": c.scales(0), "weight_scale_inv": c.scales(n // 64, k // 64)}


def awq(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    scales = 2.0 ** c.integers(-6, -2, k // GROUP, n)
    numbers = [c.integers(0, 16, rows, n // 8, 8) for rows in (k, k // GROUP)]
    return {"qweight": pack(numbers[0]), "qzeros": pack(numbers[1]), "scales": scales.half()}


def gptq(c: Checkpoint, n: int, k: int, act_order: bool = False) -> dict[str, torch.Tensor]:
    groups = torch.arange(k) // GROUP
    if act_order:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(0))]
    return {
        "qweight": pack(c.integers(0, 16, k // 8, n, 8)),
        "qzeros": pack(c.integers(0, 16, k // GROUP, n // 8, 8)),
        "scales": c.scales(k // GROUP, n).half(),
        "g_idx": groups.to(torch.int32),
    }


def packed(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": pack(c.integers(0, 16, n, k // 8, 8)),
        "weight_scale": c.scales(n, k // GROUP).half(),
        "weight_shape": torch.tensor([n, k]),
    }


def nvfp4(c: Checkpoint, n: int, k: int) -> dict[str, torch.Tensor]:
    return {
        "weight": c.integers(0, 256, n, k // 2).to(torch.uint8),
        "weight_scale": (c.scales(n, k // 16) * 640).to(FP8),
        "weight_scale_2": c.scales(1)[0],
        "input_scale": c.scales(1)[0],
    }


def compressed(bits: int, kind: str, strategy: str, activations: dict[str, Any] | None, **weights: Any) -> Any:
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights,
        },
        "input_activations": activations,
    }  # fmt: skip
    name = "pack-quantized" if activations is None else {"float": "float-quantized", "int": "int-quantized"}[kind]
    config = {"format": name, "config_groups": {"group_0": group}, "ignore": [], "quant_method": "compressed-tensors"}
    return CompressedTensorsConfig.from_config(config)


def per_token(bits: int, kind: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}


def fp8_config(**fields: Any) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(is_checkpoint_fp8_serialized=True, **fields)


def config_of(module: str, name: str, **fields: Any) -> Any:
    import importlib

    config = getattr(importlib.import_module(f"sglang.srt.layers.quantization.{module}"), name)
    return config.from_config(fields)


def gptq_config(act_order: bool) -> Any:
    fields = {"bits": 4, "group_size": GROUP, "desc_act": act_order, "sym": True, "lm_head": False}
    return config_of("gptq", "GPTQMarlinConfig", quant_method="gptq", **fields)


def awq_fields() -> dict[str, Any]:
    return {"bits": 4, "group_size": GROUP, "zero_point": True, "quant_method": "awq"}


@dataclass
class Format:
    """A format of quantized weights.

    Attributes:
        config: Makes SGLang's configuration.
        tensors: Makes the tensors of a weight in a checkpoint.
        columns: How SP multiplies with column-parallel layers.
        dtype: The type of activations.
        exact_inputs: Whether activations must have few bits, because the sums of the reference are not float64.
        gpu: The GPU for which SGLang processes the weights.
    """

    config: Callable[[], Any]
    tensors: Callable[..., dict[str, torch.Tensor]]
    columns: str
    dtype: torch.dtype = torch.bfloat16
    exact_inputs: bool = False
    gpu: str = "H100"


ONE, EACH = "one GEMM", "a GEMM for each shard"
FORMATS: dict[str, Format] = {
    "unquantized": Format(lambda: None, plain, ONE, torch.float32, exact_inputs=True),
    "fp8, per tensor, dynamic": Format(lambda: fp8_config(activation_scheme="dynamic"), fp8_tensor, ONE),
    "fp8, per tensor, static": Format(lambda: fp8_config(activation_scheme="static"), fp8_static, ONE),
    "fp8, blocks of 128": Format(
        lambda: fp8_config(activation_scheme="dynamic", weight_block_size=[128, 128]), fp8_block(128), ONE
    ),
    "fp8, blocks of 64": Format(
        lambda: fp8_config(activation_scheme="dynamic", weight_block_size=[64, 64]), fp8_block(64), ONE
    ),
    "w8a8_fp8": Format(
        lambda: config_of("w8a8_fp8", "W8A8Fp8Config", quant_method="compressed-tensors"), fp8_channel, ONE
    ),
    "w8a8_int8": Format(lambda: config_of("w8a8_int8", "W8A8Int8Config"), int8_channel, ONE),
    "blockwise_int8": Format(
        lambda: config_of(
            "blockwise_int8", "BlockInt8Config", quant_method="int8", activation_scheme="dynamic",
            weight_block_size=[64, 64],
        ),
        int8_block, ONE,
    ),
    "compressed-tensors fp8, channel": Format(
        lambda: compressed(8, "float", "channel", per_token(8, "float")), fp8_channel, ONE
    ),
    "compressed-tensors fp8, tensor": Format(
        lambda: compressed(8, "float", "tensor", per_token(8, "float")), fp8_tensor, EACH
    ),
    "compressed-tensors fp8, block": Format(
        lambda: compressed(
            8, "float", "block", {**per_token(8, "float"), "strategy": "group", "group_size": 128},
            block_structure=[128, 128],
        ),
        fp8_block(128, "weight_scale"), ONE,
    ),
    "compressed-tensors int8": Format(
        lambda: compressed(8, "int", "channel", per_token(8, "int")), int8_channel, ONE
    ),
    "compressed-tensors w4a16": Format(
        lambda: compressed(4, "int", "group", None, group_size=GROUP), packed, EACH
    ),
    "modelopt fp8": Format(
        lambda: config_of(
            "modelopt_quant", "ModelOptFp8Config", quant_method="modelopt", quant_algo="FP8", ignore=[], packed_modules_mapping={}
        ),
        fp8_static, ONE,
    ),
    "awq": Format(lambda: config_of("awq", "AWQConfig", **awq_fields()), awq, EACH, torch.float16, exact_inputs=True),
    "awq_marlin": Format(lambda: config_of("awq", "AWQMarlinConfig", **awq_fields()), awq, EACH, torch.float16),
    "gptq_marlin": Format(lambda: gptq_config(False), gptq, EACH, torch.float16),
    "gptq_marlin, desc_act": Format(
        lambda: gptq_config(True), lambda c, n, k: gptq(c, n, k, act_order=True), EACH, torch.float16
    ),
    "modelopt nvfp4": Format(
        lambda: config_of(
            "modelopt_quant", "ModelOptFp4Config", quant_method="modelopt", quant_algo="NVFP4", group_size=16,
            ignore=[], packed_modules_mapping={},
        ),
        nvfp4, EACH, gpu="B200",
    ),
}  # fmt: skip


@contextmanager
def tensor_parallel(rank: int, world: int) -> Iterator[None]:
    """Inside of this context, SGLang builds layers for ``rank``."""
    from sglang.srt.runtime_context import get_parallel

    values = {"tp_rank": rank, "tp_size": world, "attn_tp_rank": rank, "attn_tp_size": world}
    with get_parallel().override(**values):
        yield


def build(kind: str, config: Any, dtype: torch.dtype, bias: bool = True) -> Any:
    """One of SGLang's linears, with weights that are not loaded."""
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    common: dict[str, Any] = {"bias": bias, "quant_config": config, "params_dtype": dtype}
    if kind == "qkv":
        return QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, prefix="layers.0.self_attn.qkv_proj", **common)
    if kind == "gate_up":
        return MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2, prefix="layers.0.mlp.gate_up_proj", **common)
    return RowParallelLinear(INTERMEDIATE, HIDDEN, prefix="layers.0.mlp.down_proj", **common)


PARTS: dict[str, dict[Any, tuple[int, int]]] = {
    "qkv": {"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN)},
    "gate_up": {0: (INTERMEDIATE, HIDDEN), 1: (INTERMEDIATE, HIDDEN)},
    "down": {None: (HIDDEN, INTERMEDIATE)},
}
"""The weights of a checkpoint that make up each linear: ``[n, k]`` by SGLang's shard id."""


def load(layer: Any, kind: str, tensors: Callable[..., dict[str, torch.Tensor]], seed: int = 0) -> None:
    """Load a random checkpoint with the layer's own weight loaders, and let SGLang process it."""
    checkpoint = Checkpoint(seed)
    for shard_id, (n, k) in PARTS[kind].items():
        weights = dict(tensors(checkpoint, n, k))
        if layer.bias is not None:
            weights["bias"] = checkpoint.integers(-8, 9, n) / 8
        for name, tensor in weights.items():
            parameter = getattr(layer, name, None)
            if parameter is not None:
                loader = parameter.weight_loader
                loader(parameter, tensor) if shard_id is None else loader(parameter, tensor, shard_id)
    layer.quant_method.process_weights_after_loading(layer)


def inputs(rows: int, columns: int, fmt: Format, seed: int = 1) -> torch.Tensor:
    checkpoint = Checkpoint(seed)
    x = checkpoint.integers(-8, 9, rows, columns) / 8 if fmt.exact_inputs else checkpoint.normal(rows, columns)
    return x.to(fmt.dtype)
