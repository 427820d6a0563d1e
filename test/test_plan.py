"""Plans: models and memory, replicas, the search, and the command."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import pytest
from sglang_shift.benchmark.link_rate import TARGETS
from sglang_shift.demo import demo_model_path
from sglang_shift.errors import ShiftError
from sglang_shift.layout import RankLayout
from sglang_shift.modes import Mode
from sglang_shift.plan import __main__ as command
from sglang_shift.plan import report
from sglang_shift.plan.hardware import gpus
from sglang_shift.plan.memory import memory
from sglang_shift.plan.model import Model, read_model
from sglang_shift.plan.search import CHUNKS, Candidate, layouts, search, serve, thresholds
from sglang_shift.plan.step_time import StepTimes
from sglang_shift.sizing import MIB
from sglang_shift.traffic import Request, steady

H200 = gpus()["H200"]
LLAMA = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072)
FP8 = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072, "fp8")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def config(folder, **changes):
    content = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


class TestModel:
    def test_a_file_and_its_folder(self, tmp_path):
        file = config(tmp_path)
        assert read_model(file) == read_model(tmp_path)
        model = read_model(file)
        assert (model.layers, model.vocabulary, model.context, model.weights) == (4, 32_000, 8192, "bfloat16")
        assert (model.name, model.tied, model.qk_norm) == (tmp_path.name, False, False)

    def test_the_demo_model(self):
        assert read_model(demo_model_path()).layer.hidden == 256

    @pytest.mark.parametrize(
        ("quantization", "weights"),
        [
            ({"quant_method": "fp8"}, "fp8"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
            ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
        ],
    )
    def test_quantized_ones(self, tmp_path, quantization, weights):
        assert read_model(config(tmp_path, quantization_config=quantization)).weights == weights

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_local_experts": 8}, "experts"),
            ({"torch_dtype": "float32"}, "dtype float32, for which"),
            ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which is none of LlamaForCausalLM"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization awq, for which"),
            ({"vocab_size": None}, "has no 'vocab_size'"),
        ],
    )
    def test_others_are_refused(self, tmp_path, changes, problem):
        with pytest.raises(ShiftError, match=f"{problem}.*; give the config.json of a dense decoder as --model"):
            read_model(config(tmp_path, **changes))

    def test_what_is_no_model_is_refused(self, tmp_path):
        for text in (None, "{", "[]"):
            if text is not None:
                (tmp_path / "config.json").write_text(text)
            with pytest.raises(ShiftError, match=r"config\.json: .*; give the config"):
                read_model(tmp_path)


class TestMemory:
    def test_weights_are_the_parameters(self):
        layer = LLAMA.layer
        embeddings = 2 * 128_256 * 8192
        norms = (2 * 80 + 1) * 8192
        for ranks in (1, 8):
            held = memory(LLAMA, H200, RankLayout(ranks, 1), 8192)
            assert held.weights == 2 * ((80 * layer.parameters + embeddings) // ranks + norms)
            quantized = memory(FP8, H200, RankLayout(ranks, 1), 8192)
            assert quantized.weights == (80 * layer.parameters + 2 * embeddings) // ranks + norms
            assert held.shift == quantized.shift == 0

    def test_shift_needs_the_rest_of_the_base_weights_and_graphs(self):
        for sp in (2, 4, 8):
            held = memory(FP8, H200, RankLayout(8, sp), 8192)
            assert held.shift == 80 * FP8.layer.parameters * (sp - 1) // 8 + 2 * 512 * MIB

    def test_the_rest_is_for_the_kv_cache(self):
        held = memory(FP8, H200, RankLayout(8, 1), 8192)
        assert held.pool == held.total - held.weights - held.reserve
        assert held.kv_per_token == 2 * 80 * 128 * 2
        assert held.tokens == held.pool // held.kv_per_token
        assert memory(FP8, H200, RankLayout(8, 1), 8192, "fp8").kv_per_token == 80 * 128 * 2

    def test_larger_chunks_and_larger_s_leave_less(self):
        tokens = [memory(FP8, H200, RankLayout(8, sp), 8192).tokens for sp in (1, 2, 4, 8)]
        assert tokens == sorted(tokens, reverse=True)
        reserves = [memory(FP8, H200, RankLayout(8, 1), chunk).reserve for chunk in (2048, 8192, 16384)]
        assert reserves[0] == 10 * 1024 * MIB
        assert reserves == sorted(reserves)
        assert reserves[1] == (512 + 1.5 * 8192 + 8 * 128 + 2 * 512) * MIB

    def test_what_does_not_fit_holds_no_token(self):
        held = memory(LLAMA, gpus()["H100"], RankLayout(1, 1), 8192)
        assert held.pool < 0
        assert held.tokens == 0


class TestLayouts:
    def test_all_divisors(self):
        found = {(layout.world_size, layout.sp_size): n for layout, n in layouts(LLAMA, 8)}
        assert sorted(found) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8)]
        assert [found[p, 1] for p in (1, 2, 4, 8)] == [8, 4, 2, 1]

    def test_numbers_that_do_not_divide_are_left_out(self, tmp_path):
        model = read_model(config(tmp_path, num_attention_heads=20, num_key_value_heads=20, head_dim=64))
        assert {layout.world_size for layout, _ in layouts(model, 8)} == {1, 2, 4}
        assert {layout.world_size for layout, _ in layouts(LLAMA, 6)} == {1, 2}


class TestServing:
    @pytest.fixture(scope="class")
    def costs(self):
        return StepTimes(FP8, H200, RankLayout(4, 1)).cost_model()

    def test_replicas_take_turns(self, costs):
        requests = [Request(0.0, 100 + i, 10) for i in range(6)]
        both = serve(requests, Candidate(RankLayout(4, 1), 2), costs, 10_000)
        even, odd = (
            serve(part, Candidate(RankLayout(4, 1), 1), costs, 10_000) for part in (requests[::2], requests[1::2])
        )
        assert both.steps[Mode.TP] == even.steps[Mode.TP] + odd.steps[Mode.TP]
        assert both.makespan == pytest.approx(max(even.makespan, odd.makespan))
        assert sorted(s.e2e for s in both.served) == sorted(s.e2e for s in (*even.served, *odd.served))

    def test_a_replica_without_a_request_idles(self, costs):
        alone = serve([Request(5.0, 100, 10)], Candidate(RankLayout(4, 1), 8), costs, 10_000)
        assert len(alone.served) == 1
        assert alone.makespan == pytest.approx(alone.served[0].e2e)

    def test_thresholds_are_where_sp_begins(self):
        costs = StepTimes(FP8, H200, RankLayout(8, 8)).cost_model()
        found = thresholds(costs)
        assert found
        for threshold in found:
            assert any(threshold + 1 == tokens for phase in costs.attention for tokens, _ in costs.crossovers(phase))
        assert thresholds(StepTimes(FP8, H200, RankLayout(8, 1)).cost_model()) == []


class TestSearch:
    @pytest.fixture(scope="class")
    def plan(self):
        requests = steady(20.0, prompt=(500, 4000), output=(10, 60), requests=60)
        return search(FP8, H200, 8, requests)

    def test_the_best_is_the_best_of_all(self, plan):
        ends = [o.metrics["mean_e2e"] for o in (*plan.layouts, *plan.settings) if o.metrics]
        assert plan.best.metrics["mean_e2e"] == min(ends)
        assert plan.best.candidate.layout.world_size > 1  # one prompt at a time is answered by many

    def test_every_layout_chunk_and_policy_is_tried(self, plan):
        assert len(plan.layouts) == 10
        assert {o.candidate.chunk for o in plan.settings} == set(CHUNKS)
        if plan.best.candidate.layout.sp_size > 1:
            assert {"tp", "sp", "calibrated"} <= {o.candidate.policy for o in plan.settings}

    def test_what_is_too_small_is_not_tried(self):
        requests = [Request(0.0, 100_000, 10)] * 3
        plan = search(LLAMA, H200, 8, requests)
        small = next(o for o in plan.layouts if o.candidate.layout == RankLayout(1, 1))
        assert (small.metrics, small.peak) == ({}, 0.0)
        assert "too little memory" in report.table(plan.layouts, plan.best)

    def test_what_fits_nowhere_is_refused(self):
        with pytest.raises(ShiftError, match=r"does not fit 1 x H100: .* longest request .110 tokens; the most is 0"):
            search(LLAMA, gpus()["H100"], 1, [Request(0.0, 100, 10)])

    def test_flags(self):
        base = ["--tp-size", "8", "--chunked-prefill-size", "4096"]
        shift = [*base, "--sp-size", "4", "--enable-shift-parallel"]
        for policy, layout, expected in (
            ("tp", RankLayout(8, 1), base),
            ("sp", RankLayout(8, 4), [*base, "--sp-size", "4"]),
            ("calibrated", RankLayout(8, 4), shift),
            ("tokens 99", RankLayout(8, 4), [*shift, "--shift-policy", "tokens", "--shift-threshold", "99"]),
        ):
            assert report.flags(Candidate(layout, 1, 4096, policy)) == expected


class TestCommand:
    @pytest.fixture
    def trace(self, tmp_path):
        rng = random.Random(0)
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        for i in range(40):
            lines.append(f"2023-11-16 18:00:{i:02d}.1234567,{rng.randint(100, 3000)},{rng.randint(1, 40)}")
        file = tmp_path / "trace.csv"
        file.write_text("\n".join(lines))
        return file

    def test_a_plan(self, tmp_path, trace, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "2xH100", "--trace", str(trace)]
        assert command.main([*arguments, "--window", "0", "29.5", "--pace", "2"]) == 0
        printed = capsys.readouterr().out
        assert "30 requests of trace.csv, second 0 to 29.5, 2 times as fast" in printed
        assert "Recommended: " in printed and "--tp-size" in printed
        assert "quantized" not in printed
        assert printed.count("| **") >= 2  # the best, in both tables

    def test_made_up_traffic_and_a_quantized_model(self, tmp_path, capsys):
        file = config(tmp_path, quantization_config={"quant_method": "fp8"})
        arguments = ["--model", str(file), "--gpus", "1xH200", "--rate", "5", "--requests", "20"]
        assert command.main([*arguments, "--prompt", "100-200", "--output", "5", "--kv-cache-dtype", "fp8"]) == 0
        printed = capsys.readouterr().out
        assert "20 requests at 5/s" in printed
        assert "does not serve quantized models yet" in printed

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
    def test_a_picture(self, tmp_path, trace):
        picture = tmp_path / "plan.png"
        arguments = ["--model", str(config(tmp_path)), "--gpus", "2xH200", "--trace", str(trace)]
        assert command.main([*arguments, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"--gpus": "8xB900"}, "there are no figures for a B900; give H100 or H200"),
            ({"--trace": "nothing.csv"}, "--trace nothing.csv cannot be read"),
            ({"--model": "nowhere"}, "nowhere: .*; give the config.json"),
            ({"--window": "5000 10"}, "has no request from second 5000 to 5010"),
        ],
    )
    def test_refusals_are_one_sentence(self, tmp_path, trace, capsys, changes, problem):
        given = {"--model": str(config(tmp_path)), "--gpus": "2xH100", "--trace": str(trace)} | changes
        arguments = [word for key, value in given.items() for word in (key, *value.split())]
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("sglang_shift: error: ")
        assert re.search(problem, error)

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ([], "give --model, --gpus and one of --trace and --rate; or --check"),
            (["--model", "m", "--gpus", "8xH200"], "give --model, --gpus and one of"),
            (["--check", "--pace", "0"], "must be more than 0"),
            (["--check", "--prompt", "9-3"], "invalid lengths value: '9-3'"),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments, problem, capsys):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert problem in capsys.readouterr().err
