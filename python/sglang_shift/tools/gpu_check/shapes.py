"""Describes how models are deployed, and which matrices one of their ranks has."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.families import Role
from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.tools.published import TARGETS

PROJECTIONS = tuple(Role)
ROW_PARALLEL = tuple(role for role in Role if role.row_parallel)
"""The projections whose TP shards are slices of columns of the base weights. Other TP shards are slices of rows."""


@dataclass(frozen=True)
class Matrix:
    """A weight of ``outputs`` rows and ``inputs`` columns, whose rows are ``stride`` elements apart."""

    outputs: int
    inputs: int
    stride: int

    @property
    def is_view(self) -> bool:
        """Whether the matrix is a slice of columns of a larger matrix."""
        return self.stride != self.inputs

    @property
    def contiguous(self) -> Matrix:
        """The same matrix without gaps between its rows."""
        return Matrix(self.outputs, self.inputs, self.inputs)

    def flops(self, rows: int) -> int:
        """Return the FLOPs of ``rows`` rows times this matrix: two for each element and row."""
        return 2 * rows * self.outputs * self.inputs

    def traffic(self, rows: int, element_bytes: int, output_bytes: int = 2) -> int:
        """Return the bytes of a product that reads the input and the weight once, and writes the output once."""
        return (rows + self.outputs) * self.inputs * element_bytes + rows * self.outputs * output_bytes


@dataclass(frozen=True)
class Deployment:
    """A model on P ranks with base weights for S.

    Attributes:
        model: The name of the model.
        layer: One layer of the model.
        layers: Number of layers of the model.
        ranks: P.
        sp: S.
    """

    model: str
    layer: Layer
    layers: int
    ranks: int
    sp: int

    @property
    def name(self) -> str:
        """The name of the deployment in a table."""
        return f"{self.model}, P={self.ranks}, S={self.sp}"

    @property
    def shards(self) -> dict[str, Matrix]:
        """A rank's full-TP shards by projection. Each shard is a view of its base weight."""
        shapes = self.layer.shards(self.ranks)
        return {name: Matrix(n, k, k * self.sp if name in ROW_PARALLEL else k) for name, (n, k) in shapes.items()}

    @property
    def bases(self) -> dict[str, Matrix]:
        """A rank's base weights by projection. Each is S shards, one above the other or side by side."""
        return {
            name: Matrix(m.outputs * (1 if name in ROW_PARALLEL else self.sp), m.stride, m.stride)
            for name, m in self.shards.items()
        }

    @property
    def widths(self) -> tuple[int, int]:
        """The output columns of a rank's QKV projection, and the input columns of its O projection."""
        shards = self.shards
        return shards["qkv"].outputs, shards["o"].inputs

    def sent_bytes(self, tokens: int, element_bytes: int) -> dict[str, float]:
        """Return the bytes that a rank sends to others in one layer of a step, by mode.

        TP runs two ring all-reduces over P ranks. In each, a rank sends 2 (P - 1) / P of its input
        (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). SP runs the exchange around attention.
        It also runs two all-reduces of the rank's rows over the P / S ranks of a base-TP group.
        """
        rows, base_tp = padded_local_tokens(tokens, self.sp), self.ranks // self.sp
        exchange = (self.sp - 1) * rows * sum(self.widths) * element_bytes
        hidden = self.layer.hidden * element_bytes
        tp, base = (4 * n * hidden * (p - 1) / p for n, p in ((tokens, self.ranks), (rows, base_tp)))
        return {"tp": tp, "sp": exchange + base}


_LLAMA_70B, _QWEN_32B = (TARGETS[name].layer for name in ("llama-70b", "qwen-32b"))
# These sizes are from config.json of meta-llama/Llama-3.1-8B.
_LLAMA_8B = Layer(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128)

DEPLOYMENTS = (
    Deployment("Llama-70B", _LLAMA_70B, 80, ranks=8, sp=8),
    Deployment("Llama-70B", _LLAMA_70B, 80, ranks=8, sp=4),
    Deployment("Qwen-32B", _QWEN_32B, 64, ranks=8, sp=8),
    Deployment("Llama-8B", _LLAMA_8B, 32, ranks=2, sp=2),
)
