"""Formats of quantized weights: SGLang's configuration, random checkpoints, and linears of SGLang's that load them.

The tests build the same layers on a CPU, with references in the place of SGLang's kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
GROUP = 64
"""The rows of the input that share a scale in AWQ, GPTQ and other formats of 4 bits."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder layer: columns of its hidden rows, of a head and of its MLP, and numbers of heads."""

    hidden: int = 256
    head: int = 128
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 1024

    def parts(self, kind: str) -> dict[Any, tuple[int, int]]:
        """The weights of a checkpoint that make up a linear: ``[n, k]`` by SGLang's shard id."""
        query, kv = self.heads * self.head, self.kv_heads * self.head
        parts: dict[str, dict[Any, tuple[int, int]]] = {
            "qkv": {"q": (query, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden)},
            "gate_up": {0: (self.intermediate, self.hidden), 1: (self.intermediate, self.hidden)},
            "down": {None: (self.hidden, self.intermediate)},
        }
        return parts[kind]


KINDS = ("qkv", "gate_up", "down")
"""The linears that are built: two column-parallel ones and a row-parallel one."""


class Checkpoint:
    """Makes the tensors of a checkpoint by one random generator.

    Args:
        seed: The seed of the generator.
        device: Where the tensors are.
    """

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> torch.Tensor:
        """Return numbers of the normal distribution."""
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Return integers from ``low`` to ``high - 1``."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def scales(self, *shape: int) -> torch.Tensor:
        """Return scales around 1/64."""
        return (0.5 + torch.rand(*shape, generator=self.generator, device=self.device)) / 64

    def scale(self) -> torch.Tensor:
        """Return one scale, as a tensor without dimensions."""
        return self.scales(1)[0]

    def fp8(self, n: int, k: int) -> torch.Tensor:
        """Return a weight in fp8."""
        return (self.normal(n, k) * 100).clamp(-448, 448).to(FP8)


def pack(numbers: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Pack the last dimension, of ``32 / bits`` numbers, into one int32. The first number takes the lowest bits."""
    shifted = numbers.long() << torch.arange(0, 32, bits, device=numbers.device)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


Tensors = dict[str, torch.Tensor]


def plain(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight without quantization."""
    # These numbers have few bits, so a sum of their products is exact in float32, in any order.
    return {"weight": c.integers(-8, 9, n, k) / 8}


def fp8_tensor(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in fp8 with one scale."""
    return {"weight": c.fp8(n, k), "weight_scale": c.scale()}


def fp8_static(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in fp8 with one scale, and the scale of its input."""
    return {**fp8_tensor(c, n, k), "input_scale": c.scale()}


def fp8_channel(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in fp8 with a scale for each output column."""
    return {"weight": c.fp8(n, k), "weight_scale": c.scales(n, 1)}


def fp8_block(size: int, name: str = "weight_scale_inv") -> Callable[..., Tensors]:
    """Return a function that makes weights in fp8 with a scale for each block of ``size`` by ``size``."""
    return lambda c, n, k: {"weight": c.fp8(n, k), name: c.scales(-(-n // size), -(-k // size))}


def int8_channel(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in int8 with a scale for each output column."""
    return {"weight": c.integers(-127, 128, n, k).to(torch.int8), "weight_scale": c.scales(n, 1)}


def int8_block(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in int8 with a scale for each block of 64 by 64."""
    return {"weight": int8_channel(c, n, k)["weight"], "weight_scale_inv": c.scales(n // 64, k // 64)}


def awq(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight of 4 bits as AWQ packs it, with scales that are powers of two."""
    scales = 2.0 ** c.integers(-6, -2, k // GROUP, n).float()
    numbers = [c.integers(0, 16, rows, n // 8, 8) for rows in (k, k // GROUP)]
    return {"qweight": pack(numbers[0]), "qzeros": pack(numbers[1]), "scales": scales.half()}


def gptq(c: Checkpoint, n: int, k: int, act_order: bool = False) -> Tensors:
    """Return a weight of 4 bits as GPTQ packs it. All weights of k rows have the same order of groups."""
    groups = torch.arange(k, device=c.device) // GROUP
    if act_order:
        groups = groups[torch.randperm(k, generator=Checkpoint(0, c.device).generator, device=c.device)]
    return {
        "qweight": pack(c.integers(0, 16, k // 8, n, 8)),
        "qzeros": pack(c.integers(0, 16, k // GROUP, n // 8, 8)),
        "scales": c.scales(k // GROUP, n).half(),
        "g_idx": groups.to(torch.int32),
    }


def packed(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight of 4 bits as compressed-tensors packs it."""
    return {
        "weight_packed": pack(c.integers(0, 16, n, k // 8, 8)),
        "weight_scale": c.scales(n, k // GROUP).half(),
        "weight_shape": torch.tensor([n, k]),
    }


def nvfp4(c: Checkpoint, n: int, k: int) -> Tensors:
    """Return a weight in NVFP4. Weights that SGLang runs as one have one ``weight_scale_2``."""
    return {
        "weight": c.integers(0, 256, n, k // 2).to(torch.uint8),
        "weight_scale": (c.scales(n, k // 16) * 640).to(FP8),
        "weight_scale_2": torch.tensor(1 / 64),
        "input_scale": torch.tensor(1 / 64),
    }


def compressed(bits: int, kind: str, strategy: str, activations: dict[str, Any] | None, **weights: Any) -> Any:
    """Return SGLang's configuration of compressed-tensors, with one scheme for all linears."""
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
    """Return the arguments of activations that are quantized row by row."""
    return {"num_bits": bits, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}


def fp8_config(**fields: Any) -> Any:
    """Return SGLang's configuration of fp8."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(is_checkpoint_fp8_serialized=True, **fields)


def config_of(module: str, name: str, **fields: Any) -> Any:
    """Return a configuration of SGLang's from the fields of a checkpoint."""
    config = getattr(importlib.import_module(f"sglang.srt.layers.quantization.{module}"), name)
    return config.from_config(fields)


def gptq_config(act_order: bool) -> Any:
    """Return SGLang's configuration of GPTQ with Marlin's kernel."""
    fields = {"bits": 4, "group_size": GROUP, "desc_act": act_order, "sym": True, "lm_head": False}
    return config_of("gptq", "GPTQMarlinConfig", quant_method="gptq", **fields)


def modelopt(name: str, **fields: Any) -> Any:
    """Return SGLang's configuration of a checkpoint by ModelOpt."""
    fields = {"quant_method": "modelopt", "ignore": [], "packed_modules_mapping": {}, **fields}
    return config_of("modelopt_quant", f"ModelOpt{name}Config", **fields)


def awq_fields() -> dict[str, Any]:
    """Return the fields of a checkpoint by AWQ."""
    return {"bits": 4, "group_size": GROUP, "zero_point": True, "quant_method": "awq"}


@dataclass(frozen=True)
class Format:
    """A format of quantized weights.

    Attributes:
        config: Makes SGLang's configuration.
        tensors: Makes the tensors of a weight in a checkpoint.
        columns: How SP multiplies with column-parallel layers.
        dtype: The type of activations.
        exact_inputs: Whether activations must have few bits, because the sums of the reference are not float64.
        capability: The least compute capability of a GPU with the kernel.
    """

    config: Callable[[], Any]
    tensors: Callable[..., Tensors]
    columns: str
    dtype: torch.dtype = torch.bfloat16
    exact_inputs: bool = False
    capability: tuple[int, int] = (8, 0)


ONE, EACH, FP8_GPU = "one GEMM", "a GEMM for each shard", (8, 9)
FORMATS: dict[str, Format] = {
    "unquantized": Format(lambda: None, plain, ONE, torch.float32, exact_inputs=True),
    "fp8, per tensor, dynamic": Format(
        lambda: fp8_config(activation_scheme="dynamic"), fp8_tensor, ONE, capability=FP8_GPU
    ),
    "fp8, per tensor, static": Format(
        lambda: fp8_config(activation_scheme="static"), fp8_static, ONE, capability=FP8_GPU
    ),
    "fp8, blocks of 128": Format(
        lambda: fp8_config(activation_scheme="dynamic", weight_block_size=[128, 128]),
        fp8_block(128),
        ONE,
        capability=FP8_GPU,
    ),
    "fp8, blocks of 64": Format(
        lambda: fp8_config(activation_scheme="dynamic", weight_block_size=[64, 64]),
        fp8_block(64),
        ONE,
        capability=FP8_GPU,
    ),
    "w8a8_fp8": Format(
        lambda: config_of("w8a8_fp8", "W8A8Fp8Config", quant_method="compressed-tensors"),
        fp8_channel,
        ONE,
        capability=FP8_GPU,
    ),
    "w8a8_int8": Format(lambda: config_of("w8a8_int8", "W8A8Int8Config"), int8_channel, ONE),
    "blockwise_int8": Format(
        lambda: config_of(
            "blockwise_int8",
            "BlockInt8Config",
            quant_method="int8",
            activation_scheme="dynamic",
            weight_block_size=[64, 64],
        ),
        int8_block,
        ONE,
    ),
    "compressed-tensors fp8, channel": Format(
        lambda: compressed(8, "float", "channel", per_token(8, "float")), fp8_channel, ONE, capability=FP8_GPU
    ),
    "compressed-tensors fp8, tensor": Format(
        lambda: compressed(8, "float", "tensor", per_token(8, "float")), fp8_tensor, ONE, capability=FP8_GPU
    ),
    "compressed-tensors fp8, block": Format(
        lambda: compressed(
            8,
            "float",
            "block",
            {**per_token(8, "float"), "strategy": "group", "group_size": 128},
            block_structure=[128, 128],
        ),
        fp8_block(128, "weight_scale"),
        ONE,
        capability=FP8_GPU,
    ),
    "compressed-tensors int8": Format(lambda: compressed(8, "int", "channel", per_token(8, "int")), int8_channel, ONE),
    "modelopt fp8": Format(
        lambda: modelopt("Fp8", quant_algo="FP8"),
        fp8_static,
        ONE,
        capability=FP8_GPU,
    ),
    "awq": Format(lambda: config_of("awq", "AWQConfig", **awq_fields()), awq, EACH, torch.float16, exact_inputs=True),
    # The formats from here on use Marlin's kernel, which takes minutes to compile at its first use.
    "compressed-tensors w4a16": Format(lambda: compressed(4, "int", "group", None, group_size=GROUP), packed, EACH),
    "awq_marlin": Format(lambda: config_of("awq", "AWQMarlinConfig", **awq_fields()), awq, EACH, torch.float16),
    "gptq_marlin": Format(lambda: gptq_config(False), gptq, EACH, torch.float16),
    "gptq_marlin, desc_act": Format(
        lambda: gptq_config(True), lambda c, n, k: gptq(c, n, k, act_order=True), EACH, torch.float16
    ),
    "modelopt nvfp4": Format(
        lambda: modelopt("Fp4", quant_algo="NVFP4", group_size=16),
        nvfp4,
        EACH,
        capability=(10, 0),
    ),
}


@contextmanager
def tensor_parallel(rank: int, world: int) -> Iterator[None]:
    """Inside of this context, SGLang builds layers for ``rank`` of a TP group of ``world`` ranks."""
    from sglang.srt.runtime_context import get_parallel

    values = {"tp_rank": rank, "tp_size": world, "attn_tp_rank": rank, "attn_tp_size": world}
    with get_parallel().override(**values):
        yield


def build(kind: str, fmt: Format, sizes: Sizes) -> Any:
    """Build one of SGLang's linears, whose weights are not loaded."""
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    common: dict[str, Any] = {"bias": True, "quant_config": fmt.config(), "params_dtype": fmt.dtype}
    if kind == "qkv":
        return QKVParallelLinear(
            sizes.hidden, sizes.head, sizes.heads, sizes.kv_heads, prefix="layers.0.self_attn.qkv_proj", **common
        )
    if kind == "gate_up":
        return MergedColumnParallelLinear(
            sizes.hidden, [sizes.intermediate] * 2, prefix="layers.0.mlp.gate_up_proj", **common
        )
    return RowParallelLinear(sizes.intermediate, sizes.hidden, prefix="layers.0.mlp.down_proj", **common)


def checkpoint(kind: str, fmt: Format, sizes: Sizes, seed: int = 0, device: str = "cpu") -> dict[Any, Tensors]:
    """Return a random checkpoint of a linear: its tensors, by SGLang's shard id."""
    maker = Checkpoint(seed, device)
    parts = sizes.parts(kind).items()
    return {part: {**fmt.tensors(maker, n, k), "bias": maker.integers(-8, 9, n) / 8} for part, (n, k) in parts}


def load(layer: Any, weights: dict[Any, Tensors]) -> None:
    """Load a checkpoint with the layer's own weight loaders, and let SGLang process it."""
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            parameter = getattr(layer, name, None)
            if parameter is not None:  # SGLang does not read the zero points of a symmetric format
                parameter.weight_loader(parameter, tensor, *([] if part is None else [part]))
    layer.quant_method.process_weights_after_loading(layer)


def inputs(rows: int, columns: int, fmt: Format, device: str = "cpu") -> torch.Tensor:
    """Return random activations ``[rows, columns]``."""
    maker = Checkpoint(1, device)
    x = maker.integers(-8, 9, rows, columns) / 8 if fmt.exact_inputs else maker.normal(rows, columns)
    return x.to(fmt.dtype)
