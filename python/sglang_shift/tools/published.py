"""Lists published figures of models on GPUs, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.models.decoder_layer import Layer


@dataclass(frozen=True)
class Figure:
    """A published figure: the value to use, the lowest and the highest possible value, and the source."""

    value: float
    low: float
    high: float
    source: str


@dataclass(frozen=True)
class Target:
    """A model on GPUs with a known rho, the time of a layer's all-reduces over the time of its GEMMs.

    Attributes:
        name: The name in words.
        layer: One layer of the model.
        layer_source: The source of the layer's sizes.
        gemm_flops: A GPU's sustained FLOP/s in GEMMs.
        bus_bandwidth: Bytes per second of its all-reduces, as nccl-tests count them.
        ranks: Number of GPUs.
        element_bytes: Bytes of an activation's element in an all-reduce.
    """

    name: str
    layer: Layer
    layer_source: str
    gemm_flops: Figure
    bus_bandwidth: Figure
    ranks: int = 8
    element_bytes: int = 2

    @property
    def rho(self) -> Figure:
        """All-reduce time over GEMM time. For its low and high value, both figures are at their ends."""
        flops, bandwidth = self.gemm_flops, self.bus_bandwidth
        return Figure(
            self._rho(flops.value, bandwidth.value),
            self._rho(flops.low, bandwidth.high),
            self._rho(flops.high, bandwidth.low),
            "computed",
        )

    def _rho(self, flops: float, bandwidth: float) -> float:
        communication = self.layer.all_reduce_bytes(self.ranks, self.element_bytes) / bandwidth
        return communication / (2 * self.layer.parameters / self.ranks / flops)


# The value is for Llama 70B's up projection at TP=8, with row-wise scales, on an H100 that is limited to 500 W. The low
# value includes the quantisation of the activations. The high value is the best figure of the kernel that SGLang uses
# for large shapes.
_FP8 = Figure(
    1141.38e12,
    876.66e12,
    1520e12,
    "Add fp8 row/block-wise scaled GEMMs, https://github.com/pytorch/FBGEMM/pull/2546; high: Route large SM90 "
    "row/column-scaled FP8 GEMMs to Torch, https://github.com/sgl-project/sglang/pull/34318",
)
# These are from the table's PyTorch column, for 8 x H200. The value is for the size nearest to a chunk of 4096 tokens.
# Low and high are for the sizes nearest to 2048 and 8192 tokens.
_ALL_REDUCE = (
    "Networking Benchmarks, How the calls are timed, "
    "https://github.com/stas00/ml-engineering/blob/master/network/benchmarks/README.md"
)

TARGETS = {
    "llama-70b": Target(
        "Llama-3.3-70B FP8, TP=8 on 8 x H200",
        Layer(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128),
        "config.json of a derivative, https://huggingface.co/hf-100/Llama-3.3-Instruct-Spellbound-StoryWriter-70B-"
        "instruct-0.3-chkpt-744-4bit/commit/99da9afd021d09b4e1b9063318d57deafd66a10e",
        _FP8,
        Figure(368.86e9, 301.25e9, 414.54e9, f"{_ALL_REDUCE}, 64 MiB (32 and 128)"),
    ),
    "qwen-32b": Target(
        "Qwen3-32B FP8, TP=8 on 8 x H200",
        Layer(hidden=5120, intermediate=25600, heads=64, kv_heads=8, head_dim=128),
        "MindSpeed-RL, qwen3_32b.yaml, https://gitcode.com/Ascend/MindSpeed-RL/blob/master/configs/model/qwen3_32b.yaml",
        _FP8,
        Figure(301.25e9, 255.90e9, 368.86e9, f"{_ALL_REDUCE}, 32 MiB for 40 (16 for 20, and 64 for 80)"),
    ),
}
