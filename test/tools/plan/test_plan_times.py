"""Step times from published figures: bytes and FLOPs against closed formulae, figures against one another."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import hypot

import msgspec
import pytest
from sglang_shift.cost.model import PHASES, CostModel, Curve
from sglang_shift.errors import ShiftError
from sglang_shift.models.decoder import Decoder, Experts, Latent
from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.formats import BFLOAT16, FP8, Format
from sglang_shift.modes import Mode, StepState
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.tools.plan.hardware import NODE, Gemm, Gpu, Kernel, gpus, parse_gpus
from sglang_shift.tools.plan.model import Model
from sglang_shift.tools.plan.step_time import TOKENS, Engine, StepTimes
from sglang_shift.tools.published import TARGETS

SMALL = Layer(hidden=64, intermediate=256, heads=8, kv_heads=4, head_dim=8)
FREE = Kernel(0.0, 1e300)
NOTHING = {n: Curve((1,), (0.0,)) for n in (2, 4, 8)}
BYTES = {n: Curve((1, 2), (1.0, 2.0)) for n in (2, 4, 8)}
LLAMA = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072, "fp8")


def gpu(gemm=None, elementwise=FREE, all_reduces=NOTHING, all_to_alls=NOTHING, attention=FREE):
    """A GPU on which everything is free but what is given."""
    gemm = gemm or Gemm(0.0, 1e300, 1e300, 2)
    kinds = dict.fromkeys(("bfloat16", "fp8", "fp8_block"), gemm)
    caches = dict.fromkeys(("bfloat16", "fp8"), attention)
    return Gpu("none", 1, 1.0, kinds, attention, caches, elementwise, all_reduces, all_to_alls)


def times(on, world_size=1, sp_size=1, layer=SMALL, **options):
    fields = {"weights": "bfloat16", "architecture": "LlamaForCausalLM", **options.pop("model", {})}
    model = Model("m", layer, 3, 1024, 4096, **fields)
    return StepTimes(model, on, RankLayout(world_size, sp_size), **options)


class TestFigures:
    def test_what_is_computed_from_is_less_than_the_nominal(self):
        for on in gpus().values():
            kernels = (on.elementwise, on.decode_attention["bfloat16"])
            rates = [*(g.bandwidth for g in on.gemms.values()), *(kernel.rate for kernel in kernels)]
            assert all(0.8 < rate / on.hbm < 0.95 for rate in rates)

    def test_two_sources_agree(self):
        """Those of the emulated link are other people's."""
        h200, target = gpus()["H200"], TARGETS["llama-70b"]
        size = 64 << 20
        assert size * 2 * 7 / 8 / h200.all_reduce(8, size) == pytest.approx(target.bus_bandwidth.value, rel=0.02)
        for on in gpus().values():
            assert on.gemms["fp8"].flops == pytest.approx(target.gemm_flops.value, rel=0.05)

    def test_larger_messages_never_take_less(self):
        for on in gpus().values():
            for curve in (*on.all_reduces.values(), *on.all_to_alls.values()):
                assert all(a <= b for a, b in pairwise(curve.values))
                assert 1e-6 < curve.values[0] < 20e-6

    def test_one_rank_does_not_communicate(self):
        assert gpus()["H100"].all_reduce(1, 1e9) == gpus()["H100"].all_to_all(1, 1e9) == 0.0

    @pytest.mark.parametrize("text", ["8xH200", " 8 X h200 "])
    def test_gpus_are_read(self, text):
        assert parse_gpus(text) == (8, gpus()["H200"])

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("H200", "is not a number of GPUs and their kind; give for example 8xH200"),
            ("8xB900", "no figures for a B900; give H100 or H200"),
            ("16xH200", f"inside a node only; give 1 to {NODE} GPUs"),
            ("0xH100", "give 1 to 8"),
        ],
    )
    def test_others_are_refused(self, text, problem):
        with pytest.raises(ShiftError, match=problem):
            parse_gpus(text)


class TestGemms:
    def test_the_roofline(self):
        gemm = Gemm(5e-6, 3e12, 1e15, 1)
        moved, work = (7 + 512) * 1024 + 2 * 7 * 512, 2 * 7 * 512 * 1024
        assert gemm.seconds(7, 512, 1024) == pytest.approx(5e-6 + hypot(moved / 3e12, work / 1e15))

    def test_few_rows_wait_for_the_weights_and_many_for_the_arithmetic(self):
        gemm = gpus()["H200"].gemms["fp8"]
        n, k = 57344, 8192
        assert gemm.seconds(8, n, k) < 1.05 * gemm.seconds(1, n, k)
        assert gemm.seconds(1, n, k) == pytest.approx(n * k / gemm.bandwidth, rel=0.1)
        assert gemm.seconds(16384, n, k) == pytest.approx(2 * 16384 * n * k / gemm.flops, rel=0.05)

    @pytest.mark.parametrize("sp", [1, 2, 4])
    @pytest.mark.parametrize("phase", PHASES)
    def test_flops_are_the_parameters(self, phase, sp):
        """Twice as many as there are weights, for each token; divided by all ranks in both modes."""
        on = gpu(Gemm(0.0, 1e300, 1.0, 2))
        head = 2 * 1024 * 64 * (8 if phase == "decode" else 1)
        for mode in Mode:
            total = times(on, 4, sp).parts(mode, phase, 8)["gemm"]
            assert total == pytest.approx((3 * 2 * 8 * SMALL.parameters + head) / 4)

    def test_a_rank_reads_its_share_of_the_weights_in_tp_and_that_of_its_base_tp_in_sp(self):
        on = gpu(Gemm(0.0, 1.0, 1e300, 1))
        rows = {mode: times(on, 4, 2, model={"weights": "fp8"}).parts(mode, "prefill", 2)["gemm"] for mode in Mode}
        share = {Mode.TP: 4, Mode.SP: 2}
        for mode, m in ((Mode.TP, 2), (Mode.SP, 1)):
            shards = SMALL.shards(share[mode]).values()
            inputs, outputs = sum(k for _, k in shards), sum(n for n, _ in shards)
            layers = 3 * (SMALL.parameters / share[mode] + m * inputs + 2 * m * outputs)
            head = (1 + 256) * 64 + 2 * 256
            assert rows[mode] == pytest.approx(layers + head)

    def test_heads_that_are_replicated_are_computed_and_read_by_each(self):
        on = gpu(Gemm(0.0, 1e300, 1.0, 2), attention=Kernel(0.0, 1.0))
        eight = times(on, 8)
        assert eight.block.values == 8  # 4 KV heads for 8 ranks
        assert eight.attention("decode") == 2 * 8 * 2 * 3
        qkv = 2 * 64 * (8 + 2 * 8)
        assert eight._gemms(1, 1) == pytest.approx(qkv + 2 * (64 * 8 + 3 * 64 * 32))

    def test_an_engine_has_factors_by_rows_and_a_time_of_its_own(self):
        on = gpu(Gemm(0.0, 1e300, 1.0, 2))
        plain, slow = times(on), times(on, engine=Engine(step=0.5, gemm_factor={1: 1.0, 16: 3.0}))
        for rows, factor in ((15, 1), (16, 3)):
            assert slow._gemms(rows, 1) == pytest.approx(factor * plain._gemms(rows, 1))
        assert slow.seconds(Mode.TP, "decode", 1) == pytest.approx(0.5 + plain.seconds(Mode.TP, "decode", 1))


class TestCommunication:
    def test_tp_reduces_twice_a_layer_and_once_at_the_embedding(self):
        sizes = times(gpu(all_reduces=BYTES), 4).parts(Mode.TP, "prefill", 10)["communication"]
        assert sizes == (2 * 3 + 1) * 10 * 64 * 2

    @pytest.mark.parametrize("ranks", [2, 4, 8])
    def test_sp_exchanges_what_the_layer_says(self, ranks):
        """A rank sends (P - 1) / P of its buffers."""
        on = gpu(all_to_alls=BYTES)
        rows = 16 // ranks
        step = times(on, ranks, ranks)
        assert step._layer_communication(rows, ranks) * (ranks - 1) / ranks == pytest.approx(
            16 * SMALL.exchange_bytes(ranks, 2)
        )
        whole = step.parts(Mode.SP, "prefill", 16)["communication"]
        ends = 16 * 64 * 2 + 64 * 2 + 1024 * 2  # embedding, the last row, its logits
        assert whole == pytest.approx(3 * step._layer_communication(rows, ranks) + ends)

    def test_what_is_left_of_tp_works_on_a_share_of_the_tokens(self):
        reduced = times(gpu(all_reduces=BYTES), 8, 4).parts(Mode.SP, "prefill", 9)["communication"]
        assert reduced == (2 * 3 + 1) * 3 * 64 * 2  # 9 tokens over 4 ranks: 3 rows

    def test_decodes_gather_every_token_for_the_lm_head(self):
        step = times(gpu(all_to_alls=BYTES), 2, 2)
        more = step.parts(Mode.SP, "decode", 6)["communication"] - step.parts(Mode.SP, "prefill", 6)["communication"]
        assert more == 5 * (64 + 1024) * 2


class TestElementwise:
    def test_bytes_of_a_layer(self):
        on = gpu(elementwise=Kernel(0.0, 1.0))
        queries, values, tokens = 16, 8, 6
        shared = 2 * tokens * 2 * (queries + values) + 2 * tokens * 4 * values
        for mode, rows, sp in ((Mode.TP, tokens, 1), (Mode.SP, 2, 4)):
            own = rows * 2 * (8 * 64 + 3 * 64 * sp)
            packed = 2 * rows * 2 * 2 * sp * (2 * queries + 2 * values) if sp > 1 else 0
            total = times(on, 4, 4).parts(mode, "prefill", tokens)["elementwise"]
            assert total == pytest.approx(3 * (shared + own + packed) + 2 * tokens * 64 * 2)

    def test_kernels_of_a_layer(self):
        on = gpu(elementwise=Kernel(1.0, 1e300))

        def count(mode=Mode.TP, **fields):
            return (times(on, 4, 4, model=fields).parts(mode, "decode", 1)["elementwise"] - 1) / 3

        assert count() == pytest.approx(5)
        assert count(weights="fp8") == count(Mode.SP) == pytest.approx(9)
        assert count(architecture="Qwen3ForCausalLM") == pytest.approx(6)


class TestTokenShards:
    LAYER = replace(SMALL, kv_heads=2)  # on 8 GPUs, four have the same KV head

    @pytest.mark.parametrize("shards", [2, 4])
    def test_a_decode_moves_queries_and_partial_outputs(self, shards):
        """Two collectives a layer, of buffers with D * T heads: queries, and outputs with 4 bytes more."""
        on = gpu(all_to_alls={n: Curve((1, 1 << 30), (1.0, float(1 << 30))) for n in (2, 4, 8)})
        alone, divided = (times(on, 8, 1, self.LAYER, token_shards=count) for count in (1, shards))
        for tokens in (1, 16):
            more = divided.seconds(Mode.TP, "decode", tokens) - alone.seconds(Mode.TP, "decode", tokens)
            assert more == pytest.approx(3 * shards * tokens * (8 * 2 + 8 * 2 + 4))
            assert divided.seconds(Mode.TP, "prefill", tokens) == alone.seconds(Mode.TP, "prefill", tokens)

    def test_a_rank_reads_a_part_of_the_keys_of_a_decode(self):
        on = gpus()["H200"]
        alone, divided = (times(on, 8, 8, self.LAYER, token_shards=count) for count in (1, 4))
        assert divided.attention("decode") == pytest.approx(alone.attention("decode") / 4)
        assert divided.attention("prefill") == alone.attention("prefill")


def sparse_times(on, world_size=1, sp_size=1, copies="sharded", weights=None, latent=None, shared=0):
    """Two dense layers, and one with 16 experts of 64 of which 2 compute a token."""
    decoder = Decoder(SMALL, 3, 1024, experts=Experts(16, 2, 64, 1, shared), latent=latent)
    fields = {"description": decoder, "quantization": weights, "experts": copies}
    return StepTimes(Model("m", SMALL, 3, 1024, 4096, **fields), on, RankLayout(world_size, sp_size))


EXPERT = 3 * 64 * 64


class TestExperts:
    @pytest.mark.parametrize("copies", ["sharded", "replicated"])
    @pytest.mark.parametrize("sp", [1, 2, 4])
    def test_flops_are_the_active_parameters(self, copies, sp):
        """Each token is computed by 2 of 16 experts and by the shared one; all ranks compute the router."""
        on = gpu(Gemm(0.0, 1e300, 1.0, 2))
        active = 3 * SMALL.parameters - 3 * 64 * 256 + 2 * EXPERT + 3 * 64 * 128
        for mode in Mode:
            rows = 8 // sp if mode is Mode.SP else 8
            total = sparse_times(on, 4, sp, copies, shared=128).parts(mode, "prefill", 8)["gemm"]
            assert total == pytest.approx(2 * 8 * active / 4 + 2 * rows * 16 * 64 + 2 * 1024 // 4 * 64)

    @pytest.mark.parametrize("tokens", [1, 4, 64])
    def test_the_experts_that_some_token_needs_are_read(self, tokens):
        """TP and sharded SP read 1/P of the experts of all tokens, replicated SP reads all of those of its own rows."""
        on = gpu(Gemm(0.0, 1.0, 1e300, 2))

        def read(copies, mode):
            step = sparse_times(on, 4, 4, copies)
            sp = 4 if mode is Mode.SP else 1
            rows = -(-tokens // sp)
            experts = step._gemms(rows, sp, step.mlps[1][0]) - step._gemms(rows, sp) + dense(step, rows, sp)
            mine = rows if copies == "replicated" else rows * sp
            shard = 64 // 4 * (sp if copies == "replicated" else 1)
            activations = 2 * mine * (64 + 3 * shard + 64) * 2 + rows * 64 * 2 + 16 * 64 * 2 + 2 * rows * 16
            return (experts - activations) / (2 * 3 * 64 * shard)

        def dense(step, rows, sp):
            return sum(step._product(product) for product in step.mlps[0][0].products(rows, sp))

        for copies in ("sharded", "replicated"):
            assert read(copies, Mode.TP) == pytest.approx(16 * (1 - (14 / 16) ** tokens))
        padded = 4 * -(-tokens // 4)
        assert read("sharded", Mode.SP) == pytest.approx(16 * (1 - (14 / 16) ** padded))
        assert read("replicated", Mode.SP) == pytest.approx(16 * (1 - (14 / 16) ** (padded // 4)))

    def test_sharded_experts_gather_and_sum_all_rows_in_sp(self):
        """As many bytes as TP's all-reduce, in two parts, and the router's logits."""
        on, row = gpu(all_to_alls=BYTES), 64 * 2

        def communication(step):
            return step.parts(Mode.SP, "prefill", 8)["communication"]

        dense = communication(times(on, 4, 4))
        assert communication(sparse_times(on, 4, 4)) - dense == 8 * (2 * row + 16 * 2)
        assert communication(sparse_times(on, 4, 4, "replicated")) == dense

    @pytest.mark.parametrize(("shared", "sums"), [(0, 2), (128, 3)])
    def test_what_is_left_of_tp_sums_experts_and_shared_experts(self, shared, sums):
        step = sparse_times(gpu(all_reduces=BYTES), 8, 4, shared=shared)
        assert step._layer_communication(3, 4, step.mlps[1][0]) == sums * 3 * 64 * 2
        assert step._layer_communication(3, 1, step.mlps[1][0]) == 2 * 3 * 64 * 2

    def test_ranks_must_divide_the_experts(self):
        with pytest.raises(ShiftError, match="8 ranks for experts of 64 and shared experts of 12"):
            sparse_times(gpu(), 8, 1, shared=12)


class TestLatents:
    LATENT = Latent(query_rank=24, rank=32, rope=8, nope=16, value=16)

    @pytest.mark.parametrize("query_rank", [24, None])
    def test_flops(self, query_rank):
        """A rank computes the latents of its rows, its heads of all rows, and its share of the output."""
        latent, on = replace(self.LATENT, query_rank=query_rank), gpu(Gemm(0.0, 1e300, 1.0, 2))
        step = sparse_times(on, 4, 4, latent=latent)
        mlp = sum(step._product(product) for product in step.mlps[0][0].products(2, 4))
        query = 24 * 8 * 24 if query_rank else 64 * 8 * 24
        down = 64 * ((query_rank or 0) + 40)
        expected = 2 * 2 * down + 2 * 8 * (query + 32 * 8 * 32 + 8 * 16 * 64) / 4
        assert step._gemms(2, 4) - mlp == pytest.approx(expected)

    def test_messages(self):
        """The latents of 8 tokens on each rank, and each rank's heads of the output."""
        latents = sparse_times(gpu(all_to_alls=BYTES), 4, 4, latent=self.LATENT)
        assert latents._layer_communication(2, 4) == 8 * (24 + 40) * 2 + 8 * 2 * 16 * 2
        queries = sparse_times(gpu(all_to_alls=BYTES), 4, 4, latent=replace(self.LATENT, query_rank=None))
        assert queries._layer_communication(2, 4) == 8 * 40 * 2 + 8 * 2 * 16 * 2 + 8 * 2 * 24 * 2

    def test_a_decode_reads_the_latent_on_every_rank(self):
        on = gpu(attention=Kernel(0.0, 1.0))
        for ranks in (1, 8):
            step = sparse_times(on, ranks, latent=self.LATENT)
            heads = 8 // ranks
            assert step.attention("prefill") == 3 * 2 * heads * (24 + 16)
            assert step.attention("decode") == 3 * max(40 * 2, 2 * heads * (40 + 32))


class TestFormats:
    def test_a_format_without_figures_reads_its_bits_and_computes_as_bfloat16(self):
        on, int4 = gpus()["H200"], Format("int4", Fraction(4))
        gemm, plain = on.gemm(int4), on.gemms["bfloat16"]
        assert (gemm.flops, gemm.bandwidth, gemm.latency) == (plain.flops, plain.bandwidth, plain.latency)
        moved = 512 * 1024 / 2 + 7 * 1024 * 2 + 2 * 7 * 512
        expected = hypot(moved / plain.bandwidth, 2 * 7 * 512 * 1024 / plain.flops)
        assert gemm.seconds(7, 512, 1024) == pytest.approx(plain.latency + expected)
        assert on.gemm(FP8) is on.gemms["fp8"]

    def test_matrices_that_are_not_quantized_are_those_of_bfloat16(self):
        """gpt-oss: only its experts are quantized."""
        kept = replace(Format("mxfp4", Fraction(4)), exempt=("model.layers.*.self_attn", "model.layers.*.mlp.router"))
        step = sparse_times(gpu(), weights=kept)
        assert [product.weights for product in step.block.products(1, 1)] == [BFLOAT16, BFLOAT16]
        router, *experts = step.mlps[1][0].products(1, 1)
        assert router.weights == BFLOAT16 and {product.weights for product in experts} == {kept}


class TestSteps:
    @pytest.mark.parametrize("name", ["H100", "H200"])
    @pytest.mark.parametrize("layout", [RankLayout(1, 1), RankLayout(8, 1), RankLayout(8, 2), RankLayout(8, 8)])
    def test_more_tokens_never_take_less(self, name, layout):
        costs = StepTimes(LLAMA, gpus()[name], layout).cost_model()
        for curve in (curve for by_mode in costs.curves.values() for curve in by_mode.values()):
            assert curve.tokens == TOKENS
            assert all(a <= b for a, b in pairwise(curve.values))

    def test_one_token_is_for_tp_and_many_are_for_sp(self):
        step = StepTimes(LLAMA, gpus()["H200"], RankLayout(8, 8))
        assert step.seconds(Mode.TP, "decode", 1) < 0.5 * step.seconds(Mode.SP, "decode", 1)
        assert step.seconds(Mode.SP, "prefill", 8192) < 0.75 * step.seconds(Mode.TP, "prefill", 8192)

    def test_without_sp_the_modes_are_one(self):
        step = StepTimes(LLAMA, gpus()["H200"], RankLayout(4, 1))
        assert step.parts(Mode.TP, "prefill", 100) == step.parts(Mode.SP, "prefill", 100)

    def test_more_gpus_are_faster_but_not_as_many_times(self):
        seconds = [
            StepTimes(LLAMA, gpus()["H200"], RankLayout(p, 1)).seconds(Mode.TP, "prefill", 4096) for p in (1, 2, 4, 8)
        ]
        assert all(b < a < 2 * b for a, b in pairwise(seconds))

    def test_attention_to_other_tokens(self):
        on, layer = gpus()["H200"], LLAMA.layer
        step, cached = StepTimes(LLAMA, on, RankLayout(8, 1)), StepTimes(LLAMA, on, RankLayout(8, 1), "fp8")
        assert step.attention("prefill") == pytest.approx(4 * 8 * 128 * 80 / on.prefill_attention.rate)
        assert step.attention("decode") == pytest.approx(2 * 128 * 2 * 80 / on.decode_attention["bfloat16"].rate)
        assert cached.attention("decode") == pytest.approx(2 * 128 * 80 / on.decode_attention["fp8"].rate)
        assert layer.heads // 8 == 8

    def test_the_cost_model_is_these_times(self):
        step = StepTimes(LLAMA, gpus()["H200"], RankLayout(8, 8))
        costs = step.cost_model()
        for mode in Mode:
            decode = costs.predict(mode, StepState(64, 0, 64, kv_reads=64 * 4000))
            expected = step.seconds(mode, "decode", 64) + step.attention("decode") * (64 * 4000 - 1)
            assert decode == pytest.approx(expected)
            prefill = costs.predict(mode, StepState(4096, 4096, kv_reads=4096 * 4097 // 2))
            expected = step.seconds(mode, "prefill", 4096) + step.attention("prefill") * (4096 * 4097 // 2 - 1)
            assert prefill == pytest.approx(expected)
        assert msgspec.json.decode(msgspec.json.encode(costs), type=CostModel) == costs
