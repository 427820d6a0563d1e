"""Plans: models, memory and layouts."""

from __future__ import annotations

import pytest
from plan_models import config, known_config
from sglang.srt.arg_groups import memory_hook
from sglang.srt.arg_groups.overrides import declare_resolution, resolution_result
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.errors import ShiftError
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.models.sizes import MIB
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.tools.plan.hardware import gpus
from sglang_shift.tools.plan.memory import memory
from sglang_shift.tools.plan.model import Model, read_model
from sglang_shift.tools.plan.search import CHUNKS, layouts
from sglang_shift.tools.published import TARGETS

H200 = gpus()["H200"]
LLAMA = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072)
FP8 = Model("llama", TARGETS["llama-70b"].layer, 80, 128_256, 131_072, "fp8")


def compressed(strategy):
    groups = {"group_0": {"weights": {"num_bits": 8, "strategy": strategy}}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


class TestModel:
    def test_a_file_and_its_folder(self, tmp_path):
        file = config(tmp_path)
        assert read_model(file) == read_model(tmp_path)
        model = read_model(file)
        assert (model.layers, model.vocabulary, model.context, model.weights) == (4, 32_000, 8192, "bfloat16")
        assert (model.name, model.tied_embeddings, model.qk_norm) == (tmp_path.name, False, False)

    @pytest.mark.parametrize(
        ("path", "name", "given"),
        [
            ("models--meta--Llama-3--70B/snapshots/0e9e39f/config.json", "meta/Llama-3--70B", "meta/Llama-3--70B"),
            ("gpt/config.json", "gpt", "gpt"),
            ("qwen-32b.json", "qwen-32b", "MODEL"),
        ],
    )
    def test_its_name_and_path(self, tmp_path, monkeypatch, path, name, given):
        monkeypatch.chdir(tmp_path)
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        config(file.parent, _name_or_path="another").rename(file)
        model = read_model(path)
        assert (model.name, model.path) == (name, given)

    def test_null_is_the_default(self, tmp_path):
        file = config(tmp_path, num_key_value_heads=None)
        without = read_model(file)
        file.write_text(file.read_text().replace("{", '{"num_key_value_heads": null, "head_dim": null, ', 1))
        assert read_model(file) == without
        assert (without.layer.kv_heads, without.layer.head_dim) == (16, 64)

    def test_the_demo_model(self):
        assert read_model(demo_model_path()).layer.hidden == 256

    @pytest.mark.parametrize(
        ("quantization", "weights"),
        [
            ({"quant_method": "fp8"}, "fp8"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
            ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8"),
            (compressed("channel"), "fp8"),
            (compressed("block"), "fp8_block"),
        ],
    )
    def test_quantized_ones(self, tmp_path, quantization, weights):
        assert read_model(config(tmp_path, quantization_config=quantization)).weights == weights

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_local_experts": 8}, "experts"),
            ({"torch_dtype": "int8"}, "dtype int8"),
            ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which is none of LlamaForCausalLM"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization awq, for which"),
            ({"architectures": []}, "no architecture, which is none of"),
            ({"vocab_size": None}, "has no 'vocab_size'"),
            ({"num_hidden_layers": "80"}, "num_hidden_layers '80' is not a whole number of at least 1"),
            ({"num_attention_heads": 0}, "num_attention_heads 0 is not"),
            ({"hidden_size": True}, "hidden_size True is not"),
            ({"num_key_value_heads": -8}, "num_key_value_heads -8 is not"),
            ({"max_position_embeddings": 1}, "max_position_embeddings 1 is not a whole number of at least 2"),
        ],
    )
    def test_others_are_refused(self, tmp_path, changes, problem):
        with pytest.raises(ShiftError, match=f"{problem}.*; give the config.json of a decoder as --model"):
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
            assert held.base == quantized.base == held.graphs == 0

    def test_sp_needs_the_rest_of_the_base_weights(self):
        for sp in (2, 4, 8):
            held = memory(FP8, H200, RankLayout(8, sp), 8192)
            assert held.base == 80 * FP8.layer.parameters * (sp - 1) // 8
            assert held.graphs == 0

    @pytest.mark.parametrize("gpu", ["H100", "H200"])
    @pytest.mark.parametrize("ranks", [1, 8])
    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_the_reserve_and_the_graphs_are_sglangs(self, monkeypatch, gpu, ranks, chunk):
        """As it resolves them on such a GPU, to the digits that it rounds to; a second mode's graphs take as much."""
        on = gpus()[gpu]
        monkeypatch.setattr(memory_hook, "get_device_memory_capacity", lambda device: on.memory_mib)
        args = ShiftServerArgs(model_path=demo_model_path(), tp_size=ranks, chunked_prefill_size=chunk)
        resolve(args)
        graphs = CudaGraphConfig(PhaseConfig(backend=Backend.FULL), PhaseConfig(backend=Backend.BREAKABLE))
        # What our platform, a CPU's, had decided otherwise.
        undone = dict.fromkeys(("mem_fraction_static", "max_running_requests", "max_total_tokens"))
        declare_resolution(args, "test", device="cuda", cuda_graph_config=graphs, **undone)
        memory_hook.handle_gpu_memory_settings(args)
        held = memory(FP8, on, RankLayout(ranks, 1), chunk, shifts=True)
        assert round(1 - held.reserve / held.total, 3) == resolution_result(args, "mem_fraction_static")
        assert held.graphs == memory_hook.reserve_for_graph_mb(args) * MIB

    def test_replicated_experts_are_a_part_of_what_sp_needs(self, tmp_path):
        file, experts = known_config(tmp_path, "Mixtral-8x7B"), 32 * 8 * 3 * 4096 * 14336 * 2
        sharded, replicated = (
            memory(read_model(file, experts=copies), H200, RankLayout(8, 4), 8192)
            for copies in ("sharded", "replicated")
        )
        assert sharded.weights == replicated.weights
        attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024) * 2
        assert sharded.base == attention * 3 // 8
        assert replicated.base == (attention + experts) * 3 // 8

    def test_latents_are_on_every_rank(self, tmp_path):
        model = read_model(known_config(tmp_path, "DeepSeek-V3"))
        assert {memory(model, H200, RankLayout(p, 1), 8192).kv_per_token for p in (1, 8)} == {61 * 576 * 2}

    def test_the_rest_is_for_the_kv_cache(self):
        held = memory(FP8, H200, RankLayout(8, 2), 8192, shifts=True)
        assert held.pool == held.total - held.weights - held.base - held.graphs - held.reserve
        assert held.kv_per_token == 2 * 80 * 128 * 2
        assert held.tokens == held.pool // held.kv_per_token
        assert memory(FP8, H200, RankLayout(8, 1), 8192, "fp8").kv_per_token == 80 * 128 * 2

    def test_gpus_that_divide_tokens_hold_more_of_them(self):
        one, two = (memory(FP8, H200, RankLayout(8, 1), 8192, token_shards=count) for count in (1, 2))
        assert two.pool == one.pool and two.kv_per_token == one.kv_per_token
        assert two.tokens == 2 * one.tokens

    def test_larger_chunks_and_larger_s_leave_less(self):
        tokens = [memory(FP8, H200, RankLayout(8, sp), 8192).tokens for sp in (1, 2, 4, 8)]
        assert tokens == sorted(tokens, reverse=True)
        reserves = [memory(FP8, H200, RankLayout(8, 1), chunk).reserve for chunk in (4096, 8192, 16384)]
        assert reserves[0] < reserves[1] < reserves[2]

    def test_what_does_not_fit_holds_no_token(self):
        held = memory(LLAMA, gpus()["H100"], RankLayout(1, 1), 8192)
        assert held.pool < 0
        assert held.tokens == 0


class TestLayouts:
    def test_all_divisors(self):
        found = {(layout.world_size, layout.sp_size): n for layout, n in layouts(LLAMA, 8)}
        assert sorted(found) == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8)]
        assert [found[p, 1] for p in (1, 2, 4, 8)] == [8, 4, 2, 1]

    def test_ranks_that_the_heads_do_not_allow_are_left_out(self, tmp_path):
        model = read_model(config(tmp_path, hidden_size=1280, num_attention_heads=20, num_key_value_heads=20))
        assert {layout.world_size for layout, _ in layouts(model, 8)} == {1, 2, 4}

    def test_gpus_may_idle(self):
        assert {layout.world_size: n for layout, n in layouts(LLAMA, 7)} == {1: 7, 2: 3, 4: 1}
