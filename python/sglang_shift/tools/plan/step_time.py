"""Computes how long a step takes in each mode, kernel by kernel, as SGLang and this package run it.

The model assumes that kernels run one after the other. They run in CUDA graphs in both modes, so the CPU adds only an
engine's own time between steps. All requests of a chunk together need one row of the LM head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sglang_shift.cost.model import PHASES, CostModel, Curve, isotonic
from sglang_shift.models.families import Role
from sglang_shift.modes import MODES, Mode
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.tools.plan.hardware import Gpu
from sglang_shift.tools.plan.model import Model

ELEMENT = 2
"""Bytes of an activation."""

TOKENS = tuple(sorted({1, *(n * 2**i for i in range(14) for n in (2, 3))}))
"""Numbers of tokens for which step times are computed. Times in between are interpolated."""

Parts = dict[str, float]


@dataclass(frozen=True)
class Engine:
    """The time that an engine adds to the GPU's time.

    Attributes:
        step: Seconds between two steps.
        request: Seconds of a request outside its steps, before its first token.
        gemm_factor: Time of its matrix products over the time in the figures, by the least number of rows.
    """

    step: float = 0.0
    request: float = 0.0
    gemm_factor: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})

    def factor(self, rows: int) -> float:
        """Return the factor for a product of ``rows`` rows."""
        return self.gemm_factor[max(start for start in self.gemm_factor if start <= max(1, rows))]


class StepTimes:
    """Step times of a model on GPUs of one kind.

    Args:
        model: The model.
        gpu: The kind of all GPUs.
        layout: The number of GPUs and their groups. S = 1 is TP alone.
        kv_dtype: The dtype of the KV cache: ``bfloat16`` or ``fp8``.
        engine: The engine's own times. None means SGLang, whose scheduler works while the GPU does.

    Raises:
        ShiftError: the model cannot be divided in this way.
    """

    def __init__(
        self, model: Model, gpu: Gpu, layout: RankLayout, kv_dtype: str = "bfloat16", engine: Engine | None = None
    ) -> None:
        self.model, self.gpu, self.layout = model, gpu, layout
        self.kv_dtype, self.engine = kv_dtype, engine or Engine()
        layer, ranks = model.layer, layout.world_size
        self.shards = layer.shards(ranks)
        heads = layer.attention.of_rank(ranks)
        self.query_width, self.kv_width = heads.query * layer.head_dim, heads.kv * layer.head_dim

    def seconds(self, mode: Mode, phase: str, tokens: int) -> float:
        """Return the seconds of a step of ``tokens``, without its attention to other tokens."""
        return sum(self.parts(mode, phase, tokens).values()) + self.engine.step

    def attention(self, phase: str) -> float:
        """Return the seconds per pair of a query token and a KV-cache token, in all layers. Both modes take the same.

        In a prefill this is the time of arithmetic: two products of a head's size for each head of the rank. In a
        decode it is the time to read K and V of the rank's heads.
        """
        if phase == "prefill":
            return 4 * self.query_width * self.model.layers / self.gpu.prefill_attention.rate
        size = 1 if self.kv_dtype == "fp8" else ELEMENT
        return 2 * self.kv_width * size * self.model.layers / self.gpu.decode_attention[self.kv_dtype].rate

    def parts(self, mode: Mode, phase: str, tokens: int) -> Parts:
        """Return the seconds by kind of work, in all layers, embedding and LM head.

        Args:
            mode: The mode.
            phase: ``prefill`` or ``decode``.
            tokens: Number of tokens of the whole step.
        """
        sp = self.layout.sp_size if mode is Mode.SP else 1
        rows = padded_local_tokens(tokens, sp)
        attention = self.gpu.prefill_attention if phase == "prefill" else self.gpu.decode_attention[self.kv_dtype]
        layers = self.model.layers
        outputs = tokens if phase == "decode" else 1
        return {
            "gemm": layers * self._gemms(rows, sp) + self._head_gemm(outputs),
            "elementwise": layers * self._elementwise(tokens, rows, sp) + self._pass(tokens, self.model.layer.hidden),
            "attention": layers * attention.latency,
            "communication": layers * self._layer_communication(rows, sp) + self._ends(tokens, rows, outputs, sp),
        }

    def _gemms(self, rows: int, sp: int) -> float:
        """Return the seconds of a layer's GEMMs. Base weights are the shards of S ranks, side by side."""
        gemm, (qkv, out, gate_up, down) = self.gpu.gemms[self.model.weights], self.shards.values()
        seconds = (
            gemm.seconds(rows, sp * qkv[0], qkv[1])
            + gemm.seconds(rows, out[0], sp * out[1])
            + gemm.seconds(rows, sp * gate_up[0], gate_up[1])
            + gemm.seconds(rows, down[0], sp * down[1])
        )
        return seconds * self.engine.factor(rows)

    def _head_gemm(self, rows: int) -> float:
        vocabulary = -(-self.model.vocabulary // self.layout.world_size)
        return self.gpu.gemms["bfloat16"].seconds(rows, vocabulary, self.model.layer.hidden)

    def _elementwise(self, tokens: int, rows: int, sp: int) -> float:
        """Return the seconds of a layer's elementwise kernels. docs/cost-model.md has their bytes per row."""
        hidden, queries, values = self.model.layer.hidden, self.query_width, self.kv_width
        inner = sp * self.shards[Role.DOWN][1]
        width = queries + 2 * values
        work = [
            # The residual and the norm occur twice.
            rows * 4 * hidden * ELEMENT,
            rows * 4 * hidden * ELEMENT,
            # These are the rotary embedding, the copy of K and V into the cache, and the activation of gate and up.
            tokens * 2 * (queries + values) * ELEMENT,
            tokens * 4 * values * ELEMENT,
            rows * 3 * inner * ELEMENT,
        ]
        if self.model.qk_norm:
            work.append(tokens * 2 * (queries + values) * ELEMENT)
        if self.model.quantized:
            work += [rows * (ELEMENT + 1) * size for size in (hidden, sp * queries, hidden, inner)]
        if sp > 1:
            # Each exchange packs and unpacks its data.
            work += 2 * [rows * 2 * sp * width * ELEMENT, rows * 2 * sp * queries * ELEMENT]
        return sum(self.gpu.elementwise.seconds(size) for size in work)

    def _pass(self, tokens: int, width: int) -> float:
        return self.gpu.elementwise.seconds(2 * tokens * width * ELEMENT)

    def _layer_communication(self, rows: int, sp: int) -> float:
        """Return the seconds of two all-reduces in a base-TP group and, in SP, of the two exchanges."""
        all_reduce = self.gpu.all_reduce(self.layout.world_size // sp, rows * self.model.layer.hidden * ELEMENT)
        width = sp * (self.query_width + 2 * self.kv_width)
        exchange_in = self.gpu.all_to_all(sp, rows * width * ELEMENT)
        exchange_out = self.gpu.all_to_all(sp, rows * sp * self.query_width * ELEMENT)
        return 2 * all_reduce + exchange_in + exchange_out

    def _ends(self, tokens: int, rows: int, outputs: int, sp: int) -> float:
        """Return the seconds of the embedding, of the gather before the LM head, and of the gather of the logits."""
        ranks, row = self.layout.world_size, self.model.layer.hidden * ELEMENT
        embedding = self.gpu.all_reduce(ranks // sp, rows * row) + self.gpu.all_to_all(sp, sp * rows * row)
        logits = self.gpu.all_to_all(ranks, outputs * self.model.vocabulary * ELEMENT)
        return embedding + self.gpu.all_to_all(sp, outputs * row) + logits

    def cost_model(self) -> CostModel:
        """Return curves through these times, for the simulator and the policies."""
        curves = {
            phase: {
                mode: Curve(TOKENS, tuple(isotonic(self.seconds(mode, phase, n) for n in TOKENS))) for mode in MODES
            }
            for phase in PHASES
        }
        usual = Curve((1,), (1.0,))
        attention = {phase: self.attention(phase) for phase in PHASES}
        return CostModel(curves, dict.fromkeys(PHASES, usual), attention, switch_seconds=0.0)
