"""Sizes by config.json and by the headers of safetensors files: known models, closed formulae, tiny checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plan_models import CONFIG, KNOWN, PUBLISHED
from safetensors.torch import save_file
from sglang_shift.models.checkpoint import Tensor, checkpoint_sizes, classify, read_tensors, weight_files
from sglang_shift.models.decoder import Decoder, Experts, Latent, Place
from sglang_shift.models.decoder_config import TRAITS, decoder_of, outline_of
from sglang_shift.models.decoder_layer import Layer
from sglang_shift.models.families import FAMILIES, Role
from sglang_shift.models.formats import BFLOAT16, FP8, format_of
from sglang_shift.models.sizes import REPLICATED, SHARDED, ModelSizes, cache_of, total
from tiny_decoders import DECODERS, tiny_config
from transformers import AutoModelForCausalLM

LAYOUTS = [(1, 1, SHARDED), (2, 2, SHARDED), (4, 2, SHARDED), (4, 4, REPLICATED)]
FAMILY_TYPES = {family.model_type for family in FAMILIES.values()}
# What none of the formulae has: biases of MLPs and experts, of norms, and norms over all heads.
CLOSE = 0.013


def known(name, **changes):
    return SimpleNamespace(**{**KNOWN[name], **changes})


def deepseek_tensors(experts):
    """Names and shapes of the tensors of DeepSeek-V3's checkpoint, with other numbers of experts."""

    def plain(name, *shape, dtype="BF16", size=2):
        return Tensor(name, shape, dtype, size * torch.Size(shape).numel())

    def fp8(name, outputs, inputs):
        scales = (-(-outputs // 128), -(-inputs // 128))
        yield plain(f"{name}.weight", outputs, inputs, dtype="F8_E4M3", size=1)
        yield plain(f"{name}.weight_scale_inv", *scales, dtype="F32", size=4)

    def mlp(name, width):
        yield from fp8(f"{name}.gate_proj", width, 7168)
        yield from fp8(f"{name}.up_proj", width, 7168)
        yield from fp8(f"{name}.down_proj", 7168, width)

    yield plain("model.embed_tokens.weight", 129_280, 7168)
    yield plain("lm_head.weight", 129_280, 7168)
    yield plain("model.norm.weight", 7168)
    for layer in (f"model.layers.{i}" for i in range(62)):
        norms = {"input_layernorm": 7168, "post_attention_layernorm": 7168}
        norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        yield from (plain(f"{layer}.{name}.weight", width) for name, width in norms.items())
        yield from fp8(f"{layer}.self_attn.q_a_proj", 1536, 7168)
        yield from fp8(f"{layer}.self_attn.q_b_proj", 128 * 192, 1536)
        yield from fp8(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        yield from fp8(f"{layer}.self_attn.kv_b_proj", 128 * 256, 512)
        yield from fp8(f"{layer}.self_attn.o_proj", 7168, 128 * 128)
        if layer in ("model.layers.0", "model.layers.1", "model.layers.2"):
            yield from mlp(f"{layer}.mlp", 18432)
            continue
        yield plain(f"{layer}.mlp.gate.weight", experts, 7168)
        yield plain(f"{layer}.mlp.gate.e_score_correction_bias", experts, dtype="F32", size=4)
        for name in (*(f"experts.{i}" for i in range(experts)), "shared_experts"):
            yield from mlp(f"{layer}.mlp.{name}", 2048)


class TestKnownModels:
    @pytest.mark.parametrize("name", KNOWN)
    def test_parameters_are_those_that_were_published(self, name):
        decoder, (total, active) = decoder_of(known(name)), PUBLISHED[name]
        assert decoder.parameters == pytest.approx(total, rel=0.0015)
        # gpt-oss's authors count the LM head and not the embedding; the others round to two digits.
        embedding = decoder.embeddings // 2 if name == "gpt-oss-20b" else 0
        assert decoder.active_parameters - embedding == pytest.approx(active, rel=0.017)

    def test_deepseek_by_hand(self):
        """DeepSeek-V3: three dense layers, 58 with 256 experts of 2048 and one shared, latents of 1536 and 512 + 64."""
        attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
        expert = 3 * 7168 * 2048
        norms = 61 * (2 * 7168 + 1536 + 512) + 7168
        total = 61 * attention + 3 * 3 * 7168 * 18432 + 58 * (257 * expert + 256 * 7168) + 2 * 129_280 * 7168 + norms
        assert decoder_of(known("DeepSeek-V3")).parameters == total

    @pytest.mark.parametrize("ranks", [1, 2, 8])
    def test_the_kv_cache(self, ranks):
        heads = {"Llama-3.1-70B": (80, 8), "Mixtral-8x7B": (32, 8), "Qwen3-30B-A3B": (48, 4)}
        for name, (layers, kv_heads) in heads.items():
            assert cache_of(known(name)).bytes_per_token(ranks, 2) == 2 * layers * max(1, kv_heads // ranks) * 128 * 2
        assert cache_of(known("DeepSeek-V3")).bytes_per_token(ranks, 2) == 61 * 576 * 2, "every rank has all latents"
        assert cache_of(known("DeepSeek-V3")).bytes_per_token(ranks, 1) == 61 * 576

    def test_deepseek_on_eight_ranks(self):
        """In FP8: experts once, the rest of the layers S times, latents' projections and routers as they are."""
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        sizes = ModelSizes.of(known("DeepSeek-V3"), format_of(quantization))
        expert, latent = 3 * 7168 * 2048, 512 * 128 * 256
        whole = 61 * 7168 * 2112 + 61 * (2 * 7168 + 2048) + 7168 + 2 * 58 * 256 * 7168
        shard = (61 * (1536 * 128 * 192 + latent) + 2 * 61 * latent) // 8 + 2 * 2 * 129_280 * 7168 // 8
        experts = 58 * 256 * expert // 8
        base = (61 * 128 * 128 * 7168 + 3 * 3 * 7168 * 18432 + 58 * expert) // 8
        for sp in (1, 2, 8):
            assert sizes.weight_bytes(8, sp, 2) == whole + shard + experts + sp * base
            assert sizes.weight_bytes(8, sp, 2, REPLICATED) == whole + shard + sp * (experts + base)


class TestConfigs:
    @pytest.mark.parametrize("name", DECODERS)
    def test_parameters_are_those_of_transformers(self, name):
        config = tiny_config(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        parameters = dict(model.named_parameters())  # a tied LM head is not among them
        decoder = decoder_of(config)
        assert decoder.parameters == pytest.approx(sum(p.numel() for p in parameters.values()), rel=CLOSE)
        matrices = [p for name, p in parameters.items() if p.dim() > 1 and not name.endswith("bias")]
        norms = sum(m.elements for m in decoder.matrices() if m.place is Place.NORMS)
        assert decoder.parameters - norms == pytest.approx(sum(p.numel() for p in matrices), rel=0.002)

    def test_traits_of_the_families_are_their_records(self):
        for name, family in FAMILIES.items():
            biases = {linear.role: linear.bias for linear in family.linears}
            traits = TRAITS[name]
            assert (traits.qkv_bias, traits.output_bias, traits.qk_norm) == (
                biases[Role.QKV], biases[Role.OUTPUT], family.qk_norm,
            )  # fmt: skip
            assert traits.gated and not biases[Role.GATE_UP] and not biases[Role.DOWN]

    @pytest.mark.parametrize(
        ("fields", "layers"),
        [
            ({}, 12),
            ({"first_k_dense_replace": 3}, 9),
            ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, 4),
            ({"moe_layer_freq": [0, 1] * 6}, 6),
            ({"decoder_sparse_step": 2}, 6),
            ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}, 5),
            ({"interleave_moe_layer_step": 2}, 6),
            ({"moe_layers": [3, 7]}, 2),
            ({"mlp_layer_types": ["dense", *["sparse"] * 11]}, 11),
            ({"moe_layer_start_index": 2, "moe_layer_end_index": 8}, 7),
            ({"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 2}, 6),
        ],
        ids=str,
    )
    def test_layers_that_have_experts(self, fields, layers):
        decoder = decoder_of(known("Mixtral-8x7B", num_hidden_layers=12, **fields))
        assert decoder.experts.layers == layers
        assert decoder.dense_layers == 12 - layers

    @pytest.mark.parametrize(
        ("fields", "shared"),
        [
            ({}, 0),
            ({"n_shared_experts": 2}, 1536),
            ({"shared_expert_intermediate_size": 5632}, 5632),
            ({"moe_num_shared_experts": 3}, 2304),
            ({"architectures": ["Llama4ForCausalLM"]}, 768),
        ],
        ids=str,
    )
    def test_shared_experts(self, fields, shared):
        assert decoder_of(known("Qwen3-30B-A3B", **fields)).experts.shared == shared

    def test_the_language_model_of_a_multimodal_one(self):
        text = known("Llama-3.1-70B")
        vision = SimpleNamespace(num_hidden_layers=2, hidden_size=64, intermediate_size=256)
        outer = SimpleNamespace(architectures=["LlavaForConditionalGeneration"], text_config=text, vision_config=vision)
        decoder = decoder_of(outer)
        assert decoder == replace(decoder_of(text), vision=decoder.vision)
        assert decoder.vision == 2 * (4 * 64 * 64 + 2 * 64 * 256)

    def test_layers_without_a_kv_cache(self):
        kinds = ["linear_attention"] * 3 + ["full_attention", "sliding_attention"]
        config = known("Llama-3.1-70B", num_hidden_layers=5, layer_types=kinds)
        assert cache_of(config).bytes_per_token(8, 2) == 2 * 2 * 128 * 2
        assert decoder_of(config).windowed_layers == 1

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"hidden_size": None}, "hidden_size"),
            ({"intermediate_size": [1, 2]}, "intermediate_size"),
            ({"num_experts_per_tok": None}, "8 experts, and no num_experts_per_tok"),
            ({"num_hidden_layers": 20_000}, "20000 layers with experts"),
            ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 32"),
        ],
        ids=str,
    )
    def test_what_is_not_known_is_said(self, fields, problem):
        with pytest.raises((KeyError, ValueError), match=problem):
            decoder_of(known("Mixtral-8x7B", **fields))

    def test_ranks_that_do_not_divide_the_experts(self):
        decoder = decoder_of(known("Qwen3-30B-A3B", moe_intermediate_size=770, decoder_sparse_step=2))
        decoder.check(2)
        with pytest.raises(RuntimeError, match="4 ranks for experts of 770"):
            decoder.check(4)


class TestHeaders:
    @pytest.mark.parametrize("name", DECODERS)
    def test_they_agree_with_the_configuration(self, name, tmp_path):
        config = tiny_config(name)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
        by_headers, by_config = checkpoint_sizes(tmp_path, config), ModelSizes.of(config)
        for ranks, sp, experts in LAYOUTS:
            read, computed = (sizes.weight_bytes(ranks, sp, 2, experts) for sizes in (by_headers, by_config))
            assert computed == (read if name in FAMILY_TYPES else pytest.approx(read, rel=CLOSE))
        assert by_headers.cache == by_config.cache

    @pytest.fixture
    def outline(self):
        return SimpleNamespace(**{**CONFIG, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2})

    @staticmethod
    def sizes(folder, config, tensors, online=BFLOAT16):
        save_file(tensors, folder / "model.safetensors")
        return checkpoint_sizes(folder, config, online)

    def test_each_kind_of_tensor(self, tmp_path, outline):
        """1024 hidden states, 16 heads of which 8 are KV heads, 4 experts, 2 layers."""
        layer, bf16 = "model.layers.1.", torch.bfloat16
        expected = {
            "model.embed_tokens.weight": ((32_000, 1024), Fraction(1, 4)),
            layer + "self_attn.q_proj.weight": ((1024, 1024), Fraction(2, 4)),
            layer + "self_attn.k_proj.weight": ((512, 1024), Fraction(2, 4)),
            layer + "self_attn.o_proj.weight": ((1024, 1024), Fraction(2, 4)),
            layer + "input_layernorm.weight": ((1024,), 1),
            layer + "mlp.gate.weight": ((4, 1024), 1),
            layer + "mlp.shared_expert_gate.weight": ((1, 1024), 1),
            layer + "mlp.shared_expert.up_proj.weight": ((64, 1024), Fraction(2, 4)),
            layer + "mlp.experts.3.up_proj.weight": ((64, 1024), Fraction(1, 4)),
            layer + "mlp.input_linear.weight": ((4, 128, 1024), Fraction(1, 4)),
            layer + "self_attn.kv_a_proj_with_mqa.weight": ((64, 1024), 1),
            layer + "self_attn.q_b_proj.weight": ((64, 32), Fraction(1, 4)),
            "model.visual.blocks.0.attn.qkv.weight": ((96, 32), Fraction(1, 4)),
            "model.layers.2.self_attn.q_proj.weight": ((1024, 1024), 0),  # a layer for speculation
            "mtp.fc.weight": ((64, 64), 0),
            layer + "self_attn.rotary_emb.inv_freq": ((64,), 0),
            "transformer.wpe.weight": ((2048, 1024), 1),
        }
        for name, (shape, share) in expected.items():
            found = self.sizes(tmp_path, outline, {name: torch.zeros(shape, dtype=bf16)}).weight_bytes(4, 2, 4)
            assert found == 4 * torch.Size(shape).numel() * share, name
        experts = {layer + "mlp.experts.3.up_proj.weight": torch.zeros(64, 1024, dtype=bf16)}
        assert self.sizes(tmp_path, outline, experts).weight_bytes(4, 2, 4, REPLICATED) == 4 * 64 * 1024 // 2

    def test_biases(self, tmp_path, outline):
        """Ranks divide the bias of what they divide by outputs, and each has that of a sum."""
        for name, outputs, share in (("k_proj", 512, Fraction(2, 4)), ("o_proj", 1024, 1)):
            module = f"model.layers.0.self_attn.{name}"
            tensors = {f"{module}.weight": torch.zeros(outputs, 1024), f"{module}.bias": torch.zeros(outputs)}
            found = self.sizes(tmp_path, outline, tensors).weight_bytes(4, 2, 2)
            assert found == 2 * outputs * (Fraction(1024 * 2, 4) + share)

    def test_few_kv_heads_are_on_several_ranks(self, tmp_path, outline):
        """Eight KV heads on 16 ranks: each rank has one, and S of them in its base weights."""
        names = {name: f"model.layers.0.self_attn.{name}.weight" for name in ("k_proj", "qkv_proj")}
        apart = self.sizes(tmp_path, outline, {names["k_proj"]: torch.zeros(512, 1024)})
        assert apart.weight_bytes(16, 4, 2) == 2 * 4 * 64 * 1024
        fused = self.sizes(tmp_path, outline, {names["qkv_proj"]: torch.zeros(2048, 1024)})
        assert fused.weight_bytes(16, 4, 2) == 2 * 4 * (64 + 2 * 64) * 1024

    def test_quantized_tensors_keep_their_bytes(self, tmp_path, outline):
        """AWQ, FP8 in blocks, and the MXFP4 of gpt-oss."""
        base, experts = "model.layers.0.mlp.down_proj.", "model.layers.0.mlp.experts."
        awq = {
            base + "qweight": torch.zeros(1024, 128, dtype=torch.int32),
            base + "qzeros": torch.zeros(8, 128, dtype=torch.int32),
            base + "scales": torch.zeros(8, 1024, dtype=torch.float16),
        }
        assert self.sizes(tmp_path, outline, awq).weight_bytes(4, 2, 2) == (4 * 1032 * 128 + 2 * 8 * 1024) // 2
        fp8 = {
            base + "weight": torch.zeros(1024, 256, dtype=torch.float8_e4m3fn),
            base + "weight_scale_inv": torch.zeros(8, 2),
        }
        assert self.sizes(tmp_path, outline, fp8).weight_bytes(4, 2, 2) == (1024 * 256 + 4 * 16) // 2
        mxfp4 = {
            experts + "down_proj_blocks": torch.zeros(4, 64, 2, 16, dtype=torch.uint8),
            experts + "down_proj_scales": torch.zeros(4, 64, 2, dtype=torch.uint8),
            experts + "down_proj_bias": torch.zeros(4, 64, dtype=torch.bfloat16),
        }
        assert self.sizes(tmp_path, outline, mxfp4).weight_bytes(4, 4, 2) == 4 * 64 * (32 + 2 + 2) // 4

    def test_names_and_shapes_of_deepseek_in_fp8(self):
        """With 8 experts a layer, and the layer for speculation. The formula leaves out the scales of blocks."""
        config = known("DeepSeek-V3", n_routed_experts=8)
        weights = format_of({"quant_method": "fp8", "weight_block_size": [128, 128]})
        by_headers = ModelSizes(total(classify(deepseek_tensors(8), outline_of(config), 8)), outline_of(config))
        by_config = ModelSizes.of(config, weights)
        for ranks, sp, experts in LAYOUTS:
            read, computed = (sizes.weight_bytes(ranks, sp, 2, experts) for sizes in (by_headers, by_config))
            assert computed == pytest.approx(read, rel=0.0005)

    def test_a_format_that_weights_get_while_they_are_loaded(self, tmp_path, outline):
        tensors = {
            "model.layers.0.mlp.up_proj.weight": torch.zeros(64, 1024),
            "model.layers.0.input_layernorm.weight": torch.zeros(1024),
            "lm_head.weight": torch.zeros(32_000, 1024),
        }
        found = self.sizes(tmp_path, outline, tensors, FP8).weight_bytes(2, 2, 2)
        assert found == 64 * 1024 + 2 * 1024 + 2 * 32_000 * 1024 // 2

    def test_a_tied_lm_head_is_not_loaded(self, tmp_path, outline):
        tensors = {name: torch.zeros(32_000, 1024) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        assert self.sizes(tmp_path, outline, tensors).weight_bytes(1, 1, 2) == 2 * 2 * 32_000 * 1024
        outline.tie_word_embeddings = True
        assert self.sizes(tmp_path, outline, tensors).weight_bytes(1, 1, 2) == 2 * 32_000 * 1024

    def test_files_that_are_not_all_there(self, tmp_path, outline):
        assert checkpoint_sizes(tmp_path, outline) is None
        shards = ["model-1.safetensors", "model-2.safetensors"]
        index = {"weight_map": {f"model.layers.{i}.norm.weight": name for i, name in enumerate(shards)}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"model.layers.0.norm.weight": torch.zeros(8)}, tmp_path / shards[0])
        assert checkpoint_sizes(tmp_path, outline) is None
        save_file({"model.layers.1.norm.weight": torch.zeros(8)}, tmp_path / shards[1])
        assert checkpoint_sizes(tmp_path, outline).weight_bytes(2, 2, 2) == 2 * 16

    def test_files_that_are_there_twice(self, tmp_path):
        for name in ("consolidated.safetensors", "model.safetensors"):
            save_file({"norm.weight": torch.zeros(8)}, tmp_path / name)
        assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
        (tmp_path / "model.safetensors").unlink()
        assert [file.name for file in weight_files(tmp_path)] == ["consolidated.safetensors"]

    @pytest.mark.parametrize(
        "content", [b"", b"\0" * 8, b"\xff" * 16, b"\x02" + b"\0" * 7 + b"[", b"\x01" + b"\0" * 7 + b"["]
    )
    def test_damaged_files(self, tmp_path, content):
        file = Path(tmp_path, "model.safetensors")
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"safetensors|Expecting"):
            list(read_tensors(file))


class TestFormats:
    @pytest.mark.parametrize(
        ("quantization", "name", "bits"),
        [
            ({}, "bfloat16", 16),
            ({"quant_method": "fp8"}, "fp8", 8),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", 8),
            ({"quant_method": "w8a8_int8"}, "int8", 8),
            ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", Fraction(4 * 128 + 16 + 4, 128)),
            ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": False}, "int4", Fraction(17, 4)),
            ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 8),
            ({"quant_method": "mxfp4"}, "mxfp4", 4.25),
            ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 8),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4.5),
            ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "int8", 8),
            ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4", 4.5),
            (
                {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"0": {"weights": {"num_bits": 4, "group_size": 128, "symmetric": True}}},
                },
                "int4",
                4.125,
            ),
        ],
        ids=str,
    )
    def test_bits_of_a_weight(self, quantization, name, bits):
        found = format_of(quantization)
        assert (found.name, found.bits) == (name, bits)
        assert found.quantized is (name != "bfloat16")

    @pytest.mark.parametrize(
        ("quantization", "problem"),
        [
            ([1], "is not an object"),
            ({"quant_method": "bitsandbytes"}, "quantization bitsandbytes, for which"),
            ({"quant_method": "gptq"}, "quantization gptq, for which there are no bits"),
            ({"quant_method": "modelopt", "quant_algo": "W4A8"}, "quantization modelopt W4A8, for which"),
        ],
        ids=str,
    )
    def test_others_are_not_known(self, quantization, problem):
        with pytest.raises(ValueError, match=problem):
            format_of(quantization)

    @pytest.mark.parametrize(
        ("field", "patterns", "share"),
        [
            ("ignore", ["lm_head"], 0),
            ("modules_to_not_convert", ["mlp.gate"], 0),  # the router, and not gate_proj
            ("modules_to_not_convert", ["model.layers.*.mlp", "lm_head"], 1),
            ("modules_to_not_convert", ["model.layers.0.mlp.gate_proj"], Fraction(1, 4)),
            ("ignore", ["re:.*layers\\.[01]\\..*"], Fraction(1, 2)),
            ("exclude_modules", ["*mlp*"], 1),
            ("dynamic", {"-:model\\.layers\\.3\\.": {}}, Fraction(1, 4)),
        ],
        ids=str,
    )
    def test_modules_that_are_not_quantized(self, field, patterns, share):
        found = format_of({"quant_method": "gptq", "bits": 4, "group_size": 128, field: patterns})
        assert found.exempt_share(Place.MLP.value, 4) == share

    def test_gpt_oss(self):
        """Experts of 4.25 bits, and everything else of 16."""
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        config = known("gpt-oss-20b")
        weights = format_of({"quant_method": "mxfp4", "modules_to_not_convert": kept})
        experts = 24 * 32 * 3 * 2880 * 2880
        found = ModelSizes.of(config, weights).weight_bytes(1, 1, 2)
        # 13.8 GB is what the published files take; https://arxiv.org/abs/2508.10925 says 12.8 GiB.
        assert found == pytest.approx(12.8 * 2**30, rel=0.01)
        plain = ModelSizes.of(config).weight_bytes(1, 1, 2)
        norms = 24 * 2 * 2880 + 2880
        assert plain - found == experts * 2 * (16 - Fraction(17, 4)) / 16 + norms * (16 - Fraction(17, 4)) / 8


class TestExperts:
    def test_experts_that_some_token_needs(self):
        experts = Experts(count=8, per_token=2, intermediate=1, layers=1)
        assert experts.distinct(1) == pytest.approx(2)
        assert experts.distinct(2) == pytest.approx(2 + 2 * 6 / 8)
        assert experts.distinct(1000) == pytest.approx(8)

    def test_a_dense_decoder_has_only_active_parameters(self):
        layer = Layer(64, 256, 8, 4, 8)
        decoder = Decoder(layer, 3, 1000)
        norms = 3 * 2 * 64 + 64
        assert decoder.parameters == decoder.active_parameters == 3 * layer.parameters + 2 * 1000 * 64 + norms

    def test_a_query_without_a_latent(self):
        latent = Latent(None, rank=32, rope=8, nope=16, value=16)
        decoder = Decoder(Layer(64, 256, 8, 8, 24), 1, 1000, latent=latent)
        attention = [m for m in decoder.matrices() if m.place is Place.ATTENTION]
        shapes = [(64, 40), (64, 8 * 24), (32, 8 * 32), (8 * 16, 64)]
        assert sorted((m.inputs, m.outputs) for m in attention) == sorted(shapes)
