"""Computes how long a step takes in each mode, kernel by kernel, as SGLang and this package run it.

The model assumes that kernels run one after the other. They run in CUDA graphs in both modes, so the CPU adds only an
engine's own time between steps. All requests of a chunk together need one row of the LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sglang_shift.cost.model import PHASES, CostModel, Curve, isotonic
from sglang_shift.modes import MODES, Mode
from sglang_shift.parallel.layout import RankLayout, padded_local_tokens
from sglang_shift.tools.plan.blocks import ELEMENT, Attention, Mlp, Product, attention_of, mlps_of
from sglang_shift.tools.plan.hardware import Gpu
from sglang_shift.tools.plan.model import Model

TOKENS = tuple(sorted({1, *(n * 2**i for i in range(14) for n in (2, 3))}))
"""Numbers of tokens for which step times are computed. Times in between are interpolated."""

LSE = 4
"""Bytes of the log-sum-exp of a partial output."""

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
        token_shards: D, the GPUs that divide the tokens of a request among them (``--dcp-size``).

    Raises:
        ShiftError: the model cannot be divided in this way.
    """

    def __init__(
        self,
        model: Model,
        gpu: Gpu,
        layout: RankLayout,
        kv_dtype: str = "bfloat16",
        engine: Engine | None = None,
        token_shards: int = 1,
    ) -> None:
        self.model, self.gpu, self.layout, self.token_shards = model, gpu, layout, token_shards
        self.kv_dtype, self.engine = kv_dtype, engine or Engine()
        decoder, weights = model.decoder, model.format
        decoder.check(layout.world_size)
        self.block: Attention = attention_of(decoder, layout, weights)
        self.mlps: list[tuple[Mlp, int]] = mlps_of(decoder, layout, weights, model.experts)

    def seconds(self, mode: Mode, phase: str, tokens: int) -> float:
        """Return the seconds of a step of ``tokens``, without its attention to other tokens."""
        return sum(self.parts(mode, phase, tokens).values()) + self.engine.step

    def attention(self, phase: str) -> float:
        """Return the seconds per pair of a query token and a KV-cache token, in all layers and in both modes.

        D ranks share the pairs of a decode, and each computes D times as many heads. The time of a decode is that of
        reading keys, so it becomes 1/D. The arithmetic of a prefill stays the same.
        """
        seconds = self.model.layers * self.block.seconds_per_pair(phase, self.gpu, self.kv_dtype)
        return seconds / self.token_shards if phase == "decode" else seconds

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
        outputs = tokens if phase == "decode" else 1
        communication = self._over_layers(lambda mlp: self._layer_communication(rows, sp, mlp))
        if phase == "decode":
            communication += self.model.layers * self._token_shard_communication(tokens)
        elementwise = self._over_layers(lambda mlp: self._elementwise(tokens, rows, sp, mlp))
        return {
            "gemm": self._over_layers(lambda mlp: self._gemms(rows, sp, mlp)) + self._head_gemm(outputs),
            "elementwise": elementwise + self._pass(tokens, self.model.layer.hidden),
            "attention": self.model.layers * attention.latency,
            "communication": communication + self._ends(tokens, rows, outputs, sp),
        }

    def _over_layers(self, seconds: Callable[[Mlp], float]) -> float:
        """Return the seconds of all layers, if the function returns the seconds of a layer with an MLP."""
        return sum(count * seconds(mlp) for mlp, count in self.mlps)

    def _gemms(self, rows: int, sp: int, mlp: Mlp | None = None) -> float:
        """Return the seconds of a layer's products. Base weights are the shards of S ranks, side by side.

        Args:
            rows: Rows of a rank.
            sp: S, or 1 in TP.
            mlp: The MLP of the layer; None means that of the first layers.
        """
        products = (*self.block.products(rows, sp), *(mlp or self.mlps[0][0]).products(rows, sp))
        return sum(self._product(product) for product in products)

    def _product(self, product: Product) -> float:
        gemm = self.gpu.gemm(product.weights)
        seconds = gemm.grouped_seconds(product.rows, product.outputs, product.inputs, product.count)
        return seconds * self.engine.factor(int(product.rows / product.count))

    def _head_gemm(self, rows: int) -> float:
        vocabulary = -(-self.model.vocabulary // self.layout.world_size)
        return self.gpu.gemms["bfloat16"].seconds(rows, vocabulary, self.model.layer.hidden)

    def _elementwise(self, tokens: int, rows: int, sp: int, mlp: Mlp) -> float:
        """Return the seconds of a layer's elementwise kernels. docs/cost-model.md has their bytes per row."""
        norms = 2 * [rows * 4 * self.model.layer.hidden * ELEMENT]  # the residual and the norm occur twice
        blocks = (*self.block.elementwise(tokens, rows, sp), *mlp.elementwise(tokens, rows, sp))
        return sum(self.gpu.elementwise.seconds(size) for size in (*norms, *blocks))

    def _pass(self, tokens: int, width: int) -> float:
        return self.gpu.elementwise.seconds(2 * tokens * width * ELEMENT)

    def _layer_communication(self, rows: int, sp: int, mlp: Mlp | None = None) -> float:
        """Return the seconds of a layer's all-reduces in a base-TP group and, in SP, of what an SP group exchanges."""
        base = self.layout.world_size // sp
        seconds = 0.0
        for messages in (self.block.messages(rows, sp), (mlp or self.mlps[0][0]).messages(rows, sp)):
            seconds += sum(self.gpu.all_reduce(base, size) for size in messages.all_reduces)
            seconds += sum(self.gpu.all_to_all(sp, size) for size in messages.all_to_alls)
        return seconds

    def _token_shard_communication(self, tokens: int) -> float:
        """Return the seconds of what a decode's layer moves if D ranks divide the tokens of its requests.

        These are two collectives: a gather of the queries, and an all-to-all of partial outputs with their log-sum-exp
        in float32. A chunk of a prompt without a prefix moves nothing. What moves for a prefix is left out.
        """
        shards, heads = self.token_shards, self.model.layer.heads // self.layout.world_size
        gathered = shards * tokens * heads
        widths = (self.model.layer.head_dim * ELEMENT, self.model.layer.head_dim * ELEMENT + LSE)
        return sum(self.gpu.all_to_all(shards, gathered * width) for width in widths)

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
