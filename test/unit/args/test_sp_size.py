"""--sp-size auto: bytes against closed formulas and real models, choices, parsing and resolution."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from sglang.srt.arg_groups import memory_hook
from sglang.srt.arg_groups.cuda_graph_hook import generate_decode_cuda_graph_batch_sizes
from sglang.srt.arg_groups.overrides import declare_resolution, resolution_result, resolving_view
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE
from sglang_shift.args import chunk_size as chunk_size_module
from sglang_shift.args import graph_memory, sp_size
from sglang_shift.args.chunk_size import adjust_chunk_size, chunk_size, fraction_for_chunk
from sglang_shift.args.graph_memory import adjust_graph_memory
from sglang_shift.args.server_args import ShiftServerArgs, prepare_server_args, resolve_shift
from sglang_shift.args.sp_size import Pool, choose_sp_size, pool_of
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused, ShiftError
from sglang_shift.graphs.plan import round_up_sizes
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.models.families import FAMILIES
from sglang_shift.models.sizes import GIB, VOCAB_PADDING, ModelSizes
from sglang_shift.platforms import cpu
from sglang_shift.resolution import shift_config_of

DEMO = json.loads(Path(demo_model_path(), "config.json").read_text())
LAYOUTS = [(p, s) for p in (2, 4, 8) for s in (2, 4, 8) if s <= p]
MODELS = [
    *((name, {}) for name in FAMILIES),
    *((name, {"attention_bias": True}) for name in ("LlamaForCausalLM", "Qwen3ForCausalLM")),
    *((name, {"head_dim": 24}) for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")),
]
LLAMA_70B = SimpleNamespace(
    architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return args


# Bytes


@pytest.mark.parametrize(("world", "sp"), LAYOUTS)
def test_weights_of_the_demo_model(world, sp):
    """The closed formula that test_instrumented.py holds against running servers."""
    layers, hidden, head = DEMO["num_hidden_layers"], DEMO["hidden_size"], DEMO["head_dim"]
    heads, kv_heads, t = DEMO["num_attention_heads"], DEMO["num_key_value_heads"], world // sp
    kv_rows = 2 * max(1, kv_heads // t) * head
    qkv = hidden * (heads // t * head + kv_rows)
    mlp = 3 * hidden * DEMO["intermediate_size"] // t
    base = layers * (qkv + hidden * heads // t * head + mlp + 2 * hidden) + hidden
    embedding = DEMO["vocab_size"] * hidden // world
    replicated = layers * hidden * (sp * 2 * max(1, kv_heads // world) * head - kv_rows)
    assert ModelSizes.of(SimpleNamespace(**DEMO)).weight_bytes(world, sp, 4) == 4 * (base + embedding + replicated)


def test_ranks_of_instances_have_whole_tables():
    sizes, embedding = ModelSizes.of(SimpleNamespace(**DEMO)), DEMO["vocab_size"] * DEMO["hidden_size"]
    more = sizes.weight_bytes(2, 2, 4, whole_tables=True) - sizes.weight_bytes(2, 2, 4)
    assert more == 4 * embedding // 2


def test_weights_that_a_server_logged():
    assert ModelSizes.of(SimpleNamespace(**DEMO)).weight_bytes(2, 2, 2) == 7082496  # docs/usage.md, Memory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "fields"), MODELS, ids=str)
def test_weights_are_the_parameters_of_transformers(name, fields, tied):
    """At P = 1 the weights are the model's parameters and the padding of the vocabulary."""
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0, architectures=[name], **fields,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    model.tie_weights()
    parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    padding = (1024 - 1000) * 64 * (1 if tied else 2)
    assert ModelSizes.of(config).weight_bytes(1, 1, 2) == 2 * (parameters + padding)


def test_bias_and_replicated_heads_of_a_rank():
    """Qwen2 on 4 ranks, S = 2: two KV heads, of which each base weight has S, one for each shard."""
    config = SimpleNamespace(
        architectures=["Qwen2ForCausalLM"], hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    qkv_rows = (2 + 2 * 2) * 16
    expected = qkv_rows * (64 + 1) + 64 * 32 + 3 * 64 * 48 + 2 * 64 + 64 + 64 * 64 // 4
    assert ModelSizes.of(config).weight_bytes(4, 2, 1) == expected


@pytest.mark.parametrize(("vocab", "world", "rows"), [(1000, 2, 512), (4096, 8, 512), (100, 3, 64), (151936, 6, 25344)])
def test_padding_of_the_vocabulary(vocab, world, rows):
    """To 64, or to 64 * P where P does not divide that."""
    fields = {"intermediate_size": 0, "num_hidden_layers": 0, "num_attention_heads": world, "num_key_value_heads": 1}
    config = SimpleNamespace(
        architectures=["LlamaForCausalLM"], hidden_size=world, vocab_size=vocab, tie_word_embeddings=True, **fields
    )
    assert ModelSizes.of(config).weight_bytes(world, 1, 1) == (rows + 1) * world
    assert VOCAB_PADDING == DEFAULT_VOCAB_PADDING_SIZE


@pytest.mark.parametrize(("world", "kv_heads"), [(1, 8), (4, 2), (8, 1), (16, 1)])
def test_kv_bytes_of_a_token(world, kv_heads):
    assert ModelSizes.of(LLAMA_70B).kv_bytes_per_token(world, 2) == 2 * 80 * kv_heads * 128 * 2


# Sources of the sizes


def mixtral(path=None, **fields):
    """SGLang's configuration of a tiny mixture of experts: 4 experts of 32, 2 layers of 64 hidden states."""
    config = {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512, "tie_word_embeddings": True,
        "num_local_experts": 4, "num_experts_per_tok": 2, **fields,
    }  # fmt: skip
    return SimpleNamespace(
        hf_config=SimpleNamespace(**config), model_path=path and str(path), context_len=128, dtype=torch.bfloat16
    )


EXPERTS = 2 * (2 * 4 * 3 * 64 * 32)
"""Bytes of the experts of :func:`mixtral`."""


@pytest.mark.parametrize(("given", "copies"), [(None, 1), ("sharded", 1), ("replicated", 2)])
def test_experts_are_held_once_or_by_every_member_of_an_sp_group(given, copies):
    rest = 2 * (512 * 64 // 4 + 2 * 4 * 64 * 64 * 2 // 4 + 2 * 4 * 64 + 5 * 64)
    found = sp_size.weight_bytes(settings(tp_size=4, shift_experts=given), mixtral(), [2])
    assert found == {2: rest + copies * EXPERTS // 4}


def test_files_that_are_here_say_more_than_the_configuration(tmp_path):
    """The headers of the files count, except with dummy weights."""
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "model.safetensors")
    model, plain = mixtral(tmp_path), mixtral()
    assert sp_size.weight_bytes(settings(), model, [2]) == {2: 2 * 64}
    by_config = sp_size.weight_bytes(settings(), plain, [2])
    assert sp_size.weight_bytes(settings(load_format="dummy"), model, [2]) == by_config
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert sp_size.weight_bytes(settings(), model, [2]) == by_config


def test_files_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "models--a--b" / "snapshots" / "123"
    folder.mkdir(parents=True)
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "model.safetensors")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("123")
    found = sp_size.weight_bytes(settings(download_dir=str(tmp_path)), mixtral("a/b"), [2])
    assert found == {2: 2 * 64}
    elsewhere = sp_size.weight_bytes(settings(download_dir=str(tmp_path / "none")), mixtral("a/b"), [2])
    assert elsewhere == sp_size.weight_bytes(settings(), mixtral(), [2])


def test_a_quantized_model_without_files():
    """In eight bits the experts and the projections take half; embeddings, routers and copies of the dtype do not."""
    fp8 = mixtral(quantization_config={"quant_method": "fp8"})
    plain, quantized = (sp_size.weight_bytes(settings(tp_size=1), m, [1])[1] for m in (mixtral(), fp8))
    assert quantized == plain - (EXPERTS + 2 * (2 * 4 * 64 * 64 + 5 * 64)) // 2
    assert sp_size.weight_bytes(settings(tp_size=1, quantization="fp8"), mixtral(), [1]) == {1: quantized}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"intermediate_size": [1]}, r"intermediate_size \[1\] is not a whole number"),
        ({"quantization_config": {"quant_method": "gguf"}}, "quantization gguf, for which there are no figures"),
    ],
    ids=str,
)
def test_sizes_that_are_not_known_need_a_number(fields, problem):
    sentence = rf"cannot tell the size of MixtralForCausalLM.*\({problem}.*\); give --sp-size a number"
    with pytest.raises(Refused, match=sentence):
        sp_size.weight_bytes(settings(), mixtral(**fields), [2])


def test_the_pool_of_a_latent_cache():
    """Every rank has the latents of all tokens."""
    latent = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    pool = pool_of(settings(max_total_tokens=10), mixtral(**latent), 64 * GIB)
    assert pool.minimum == 10 * 2 * 40 * 2


def test_the_pool_of_the_cpu_platform(monkeypatch):
    """It has 0.4 of the free memory, here half for each of two ranks, and at most 64 requests of the full context."""
    from sglang.srt.arg_groups import overrides

    args = SimpleNamespace(mem_fraction_static=None, tp_size=2, dcp_size=1)

    def tokens(model, free):
        monkeypatch.setattr(cpu.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        monkeypatch.setattr(overrides, "model_config_of", lambda _: model)
        return cpu.kv_pool_tokens(args, 2)

    model = SimpleNamespace(
        attention_arch=AttentionArch.MHA, get_total_num_kv_heads=lambda: 8, head_dim=8, num_hidden_layers=2,
        dtype=torch.bfloat16, context_len=128,
    )  # fmt: skip
    assert tokens(model, 1_000_000) == 200_000 // (2 * 2 * 4 * 8 * 2)
    assert tokens(model, 10**12) == 64 * 128
    args.dcp_size = 4
    assert tokens(model, 10**12) == 64 * 128 // 4, "of each rank; four ranks hold a request"
    assert tokens(model, 1_000_000) == 200_000 // (2 * 2 * 4 * 8 * 2), "the memory of a rank is as large"
    args.dcp_size = 1
    model.__dict__.update(attention_arch=AttentionArch.MLA, kv_lora_rank=32, qk_rope_head_dim=8)
    assert tokens(model, 1_000_000) == 200_000 // (2 * 40 * 2)


# Choices

WEIGHTS = {2: 10 * GIB, 4: 20 * GIB, 8: 40 * GIB}


@pytest.mark.parametrize(
    ("memory", "minimum", "target", "expected", "words"),
    [
        (80, 10, 40, 8, "S=8 is the largest candidate"),
        (79, 10, 40, 4, "S=4 is the largest that fits"),
        (59, 10, 40, 2, "S=2 is the largest that fits"),
        (30, 10, 40, 2, "S=2 leaves the most, 20.0 GiB"),
        (20, 10, 40, 2, "S=2 leaves the most, 10.0 GiB"),
    ],
)
def test_decision(memory, minimum, target, expected, words):
    decision = choose_sp_size(WEIGHTS, memory * GIB, Pool(minimum * GIB, target * GIB, "the pool"))
    assert decision.sp_size == expected
    assert words in decision.reason
    assert "S=2 10.0 GiB, S=4 20.0 GiB, S=8 40.0 GiB" in decision.reason
    assert "\n" not in decision.reason


def test_no_s_fits():
    with pytest.raises(Refused, match="finds no S whose weights fit beside the pool") as refusal:
        choose_sp_size(WEIGHTS, 19 * GIB, Pool(10 * GIB, 40 * GIB, "the pool"))
    assert "S=2 10.0 GiB" in str(refusal.value)
    assert "19.0 GiB" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_to_give_where_the_weights_fit_and_the_pool_does_not():
    ways = "a smaller --context-length or --max-total-tokens, --sp-size 2 with a pool of what is left"
    with pytest.raises(Refused, match=ways):
        choose_sp_size(WEIGHTS, 19 * GIB, Pool(10 * GIB, 40 * GIB, "the pool"))
    with pytest.raises(Refused) as refusal:
        choose_sp_size(WEIGHTS, 9 * GIB, Pool(1, 1, "the pool"))
    assert "--context-length" not in str(refusal.value), "no pool is small enough"


def settings(**fields):
    plain = {
        "kv_cache_dtype": "auto",
        "tp_size": 8,
        "dcp_size": 1,
        "max_total_tokens": None,
        "mem_fraction_static": 0.8,
    }
    return SimpleNamespace(**{**plain, "device": "cuda", **fields})


def model(context=131072):
    return SimpleNamespace(hf_config=LLAMA_70B, context_len=context, dtype=torch.bfloat16)


def test_pool_that_was_asked_for():
    pool = pool_of(settings(max_total_tokens=1000), model(), 64 * GIB)
    assert pool.minimum == pool.target == 1000 * 40960
    assert "1000 tokens" in pool.description


def test_pool_by_default_is_half_of_the_memory_or_one_request():
    per_request = 131072 * 40960
    assert pool_of(settings(), model(), 64 * GIB).target == 32 * GIB
    assert pool_of(settings(), model(), 64 * GIB).minimum == per_request
    assert pool_of(settings(), model(), 8 * GIB).target == per_request


def test_a_context_that_has_no_room_is_no_reason_to_refuse():
    """Llama-3.1-8B on two GPUs of 24 GB, say: stock SGLang serves it, but for the longest requests."""
    memory, longest = 20 * GIB, 131072 * 40960
    assert longest > memory // 8
    pool = pool_of(settings(), model(), memory)
    weights = {2: memory - memory // 8}
    assert choose_sp_size(weights, memory, pool).sp_size == 2
    assert "one request of 131072 tokens needs 5.0 GiB" in choose_sp_size(weights, memory, pool).reason
    with pytest.raises(Refused, match="finds no S"):
        choose_sp_size({2: weights[2] + 1}, memory, pool)
    asked = pool_of(settings(max_total_tokens=131072), model(), memory)
    with pytest.raises(Refused, match="finds no S"):
        choose_sp_size(weights, memory, asked)


@pytest.mark.parametrize(("dtype", "itemsize"), [("auto", 2), ("bf16", 2), ("fp8_e4m3", 1)])
def test_pool_in_the_dtype_of_the_kv_cache(dtype, itemsize):
    pool = pool_of(settings(kv_cache_dtype=dtype, max_total_tokens=10), model(), 64 * GIB)
    assert pool.minimum == 10 * 20480 * itemsize


def test_llama_70b_on_eight_gpus_of_80_gib(monkeypatch):
    """68 GiB a rank, and weights of 32.4 (S=2), 64.2 (S=4) and 127.9 (S=8)."""
    on_gpus(monkeypatch, 80)
    memory = sp_size.rank_memory_bytes(settings(mem_fraction_static=0.85))
    weights = {s: ModelSizes.of(LLAMA_70B).weight_bytes(8, s, 2) for s in (2, 4, 8)}
    assert memory == 68 * GIB
    assert choose_sp_size(weights, memory, pool_of(settings(), model(), memory)).sp_size == 2
    assert choose_sp_size(weights, memory, pool_of(settings(max_total_tokens=30_000), model(), memory)).sp_size == 4
    with pytest.raises(Refused, match="2000000 tokens"):
        choose_sp_size(weights, memory, pool_of(settings(max_total_tokens=2_000_000), model(), memory))


def on_gpus(monkeypatch, gib):
    for module in (sp_size, chunk_size_module):
        monkeypatch.setattr(module, "uses_shift_cpu_platform", lambda: False)
        monkeypatch.setattr(module, "get_device_memory_capacity", lambda device: gib * 1024)


def test_a_device_of_unknown_memory(monkeypatch):
    on_gpus(monkeypatch, 0)
    with pytest.raises(Refused, match="give --sp-size a number"):
        sp_size.rank_memory_bytes(settings())


# Command line, file, Python


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("4", 4), ("0", 0), ("-2", -2)])
@pytest.mark.parametrize("flag", ["--sp-size", "--sequence-parallel-size"])
def test_command_line(flag, given, value):
    assert prepare_server_args(["--tp-size", "4", f"{flag}={given}"]).sp_size == value


@pytest.mark.parametrize("given", ["auot", "3.5", "", "Auto"])
def test_garbage_on_the_command_line(given, capsys):
    with pytest.raises(SystemExit):
        prepare_server_args(["--tp-size", "4", "--sp-size", given])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"'{given}' is neither a whole number of ranks nor 'auto'" in last


@pytest.mark.parametrize(("given", "value"), [("auto", "auto"), ("2", 2)])
def test_config_file(given, value, tmp_path):
    path = tmp_path / "shift.yaml"
    path.write_text(f"tp-size: 4\nsp-size: {given}\n")
    assert prepare_server_args(["--config", str(path)]).sp_size == value


@pytest.mark.parametrize("given", ["auot", 3.5, True, "4"])
def test_garbage_from_python(given):
    with pytest.raises(ShiftError, match="is neither a whole number of ranks nor 'auto'"):
        resolved(tp_size=4, sp_size=given)


# Resolution, on a CPU


@pytest.mark.parametrize("switching", [False, True])
def test_auto_takes_all_ranks_where_the_model_is_small(switching, caplog):
    with caplog.at_level(logging.INFO):
        args = resolved(tp_size=4, sp_size="auto", enable_shift_parallel=switching)
    assert resolution_result(args, "sp_size") == 4
    assert shift_config_of(args).sp_size == 4
    assert shift_config_of(args).switching is switching
    assert "--sp-size auto: S=4 is the largest candidate" in caplog.text
    assert "S=2 3.5 MiB, S=4 6.5 MiB" in caplog.text


def free_memory(monkeypatch, mib):
    monkeypatch.setattr(sp_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=mib << 20, total=mib << 20))


@pytest.mark.parametrize(("mib", "expected"), [(80, 4), (60, 4), (30, 2)])
def test_auto_takes_what_fits(monkeypatch, mib, expected):
    """A rank has 0.8 of a quarter: 12 MiB of 60, 6 of 30; the pool of 2048 tokens takes 1."""
    free_memory(monkeypatch, mib)
    args = resolved(tp_size=4, sp_size="auto", max_total_tokens=2048)
    assert resolution_result(args, "sp_size") == expected


def write_config(folder):
    """Write the configuration of a demo model that four ranks can divide."""
    (folder / "config.json").write_text(json.dumps({**DEMO, "num_key_value_heads": 4}))


@pytest.mark.parametrize(("mib", "instances", "expected"), [(80, 2, 4), (40, 2, 2), (80, 4, 4)])
def test_auto_with_instances(monkeypatch, tmp_path, mib, instances, expected):
    """S is not smaller than the number of instances, because each of them needs the whole weights."""
    free_memory(monkeypatch, mib)
    write_config(tmp_path)
    args = resolved(model_path=str(tmp_path), tp_size=4, sp_size="auto", instances=instances, max_total_tokens=1023)
    assert resolution_result(args, "sp_size") == expected


def test_auto_with_instances_is_refused_where_each_fits_none(monkeypatch, tmp_path):
    free_memory(monkeypatch, 40)
    write_config(tmp_path)
    with pytest.raises(Refused, match="weights a rank: S=4"):
        resolved(model_path=str(tmp_path), tp_size=4, sp_size="auto", instances=4, max_total_tokens=1023)


def test_auto_is_refused_where_nothing_fits(monkeypatch):
    free_memory(monkeypatch, 20)
    with pytest.raises(Refused, match=r"beside a KV pool of 2048 tokens \(1.0 MiB\)") as refusal:
        resolved(tp_size=4, sp_size="auto", max_total_tokens=2048)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_size": 1}, "--tp-size 1 leaves nothing to shift"),
        ({"tp_size": 2, "pp_size": 2}, "--pp-size > 1 cannot be combined with sequence parallelism"),
        ({"tp_size": 16}, "does not divide the model's 8 attention heads"),
    ],
)
def test_what_is_refused_with_a_number_is_refused_with_auto(fields, message):
    with pytest.raises(ShiftError, match=message):
        resolved(sp_size="auto", **fields)


# The default, as on a GPU


def on_eight_gpus(monkeypatch, tmp_path, gib, **fields):
    """S of Llama-70B in bfloat16 on P = 8, where SGLang had resolved all of its own for GPUs of ``gib``."""
    on_gpus(monkeypatch, gib)
    monkeypatch.setattr(graph_memory, "get_device_memory_capacity", lambda device: gib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    config = {**vars(LLAMA_70B), "model_type": "llama", "torch_dtype": "bfloat16", "max_position_embeddings": 8192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = ShiftServerArgs(model_path=str(tmp_path), tp_size=8, skip_tokenizer_init=True)
    monkeypatch.setattr(cpu, "without_graphs", lambda config: config)  # the CPU platform switches them off
    resolve(args)
    gpu = {"device": "cuda", "max_total_tokens": None, "mem_fraction_static": 0.85}
    declare_resolution(args, "test", **{**gpu, "enable_shift_parallel": True, **fields})
    resolve_shift(args, lambda args: None)
    return shift_config_of(args).sp_size


@pytest.mark.parametrize(("gib", "expected"), [(80, 2), (192, 4), (320, 8)])
def test_shift_alone_takes_the_s_that_fits_the_gpus(monkeypatch, tmp_path, caplog, gib, expected):
    """Weights take 127.9 GiB with S = 8 and 64.2 with S = 4: with the pool's half, 256 and 129 of the 0.85."""
    with caplog.at_level(logging.INFO):
        assert on_eight_gpus(monkeypatch, tmp_path, gib) == expected
    assert f"--sp-size auto: S={expected} is the largest" in caplog.text


def test_a_number_is_kept_on_gpus(monkeypatch, tmp_path):
    assert on_eight_gpus(monkeypatch, tmp_path, 80, sp_size=8) == 8


def test_no_graphs_in_sp_are_warned_of_on_gpus(monkeypatch, tmp_path, caplog):
    on_eight_gpus(monkeypatch, tmp_path, 80, shift_graph_buckets=0)
    assert "--shift-graph-buckets 0: the CPU launches each kernel" in caplog.text


def test_shift_alone_is_refused_where_the_model_fits_no_gpu(monkeypatch, tmp_path):
    with pytest.raises(Refused, match=r"--sp-size auto finds no S .*S=2 32\.4 GiB"):
        on_eight_gpus(monkeypatch, tmp_path, 32)


def test_the_chunk_stays_on_a_cpu():
    args = resolved(tp_size=4, sp_size="auto")
    assert "SGLang's default for a CPU" in adjust_chunk_size(args, 4).reason
    assert resolution_result(args, "chunked_prefill_size") == resolution_result(
        resolved(tp_size=4), "chunked_prefill_size"
    )
    assert resolution_result(resolved(tp_size=4, sp_size=4, chunked_prefill_size=64), "chunked_prefill_size") == 64


# Chunk, as on a GPU


@pytest.mark.parametrize(
    ("default", "sp", "max_prefill", "max_total", "expected"),
    [
        (8192, 8, 16384, None, 8192),
        (8192, 16, 16384, None, 8192),
        (2048, 8, 16384, None, 4096),
        (4096, 64, 32768, None, 16384),
        (2048, 8, 3000, None, 3000),
        (2048, 8, 16384, 1000, 2048),
    ],
)
def test_chunk_is_only_raised_and_within_bounds(default, sp, max_prefill, max_total, expected):
    assert chunk_size(default, sp, max_prefill, max_total) == expected


def record(monkeypatch, gib, context=8192, given=None, **fields):
    """A record as SGLang resolves it on a GPU of ``gib``, with a default chunk of 2048 tokens."""
    on_gpus(monkeypatch, gib)
    monkeypatch.setattr(chunk_size_module, "resolving_view", lambda args: args.view)
    monkeypatch.setattr(chunk_size_module, "model_config_of", lambda args: args.model)
    monkeypatch.setattr(chunk_size_module, "post_capture_kv_sizing_planned", lambda args: False)
    config = SimpleNamespace(**{**DEMO, "num_attention_heads": 8, "num_key_value_heads": 8})
    view = settings(chunked_prefill_size=2048, max_prefill_tokens=16384, pp_size=1, disaggregation_mode="null")
    view.__dict__.update(fields)
    raw = {"chunked_prefill_size": None, "mem_fraction_static": None, **(given or {})}
    small = SimpleNamespace(hf_config=config, context_len=context, dtype=torch.bfloat16)
    return SimpleNamespace(**raw, view=view, model=small)


def test_a_larger_chunk_takes_its_activations_from_the_fraction(monkeypatch):
    adjustment = adjust_chunk_size(record(monkeypatch, 16), 8)
    assert adjustment.fields == {
        "chunked_prefill_size": 4096,
        "mem_fraction_static": round(0.8 - 2048 * 1.5 / 16384, 3),
    }
    assert "4096 instead of SGLang's 2048, for 512 tokens a rank" in adjustment.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"given": {"chunked_prefill_size": 2048}}, "as given"),
        ({"given": {"mem_fraction_static": 0.8}}, "the memory for activations is fixed"),
        ({"chunked_prefill_size": -1}, "does not chunk prefills"),
        ({"max_total_tokens": 2048}, "SGLang's default: 256 tokens a rank"),
        ({"context": 1 << 25}, "would take memory that the KV pool needs"),
    ],
    ids=str,
)
def test_when_the_chunk_stays(monkeypatch, change, reason):
    adjustment = adjust_chunk_size(record(monkeypatch, 16, **change), 8)
    assert adjustment.fields == {}
    assert reason in adjustment.reason


@pytest.mark.parametrize("gib", [16, 24, 80])
def test_the_fraction_is_what_sglang_gives_a_larger_chunk(monkeypatch, gib):
    """To the digits that SGLang rounds to."""
    monkeypatch.setattr(memory_hook, "get_device_memory_capacity", lambda device: gib * 1024)
    default, larger = resolved(tp_size=8), resolved(tp_size=8, chunked_prefill_size=9216)
    expected = resolution_result(larger, "mem_fraction_static")
    assert fraction_for_chunk(resolving_view(default), 9216, gib * 1024) == pytest.approx(expected, abs=0.002)
    assert expected < resolution_result(default, "mem_fraction_static")


# Graphs


def on_a_gpu_with_graphs(monkeypatch, mib=98304, post_capture=False, device="cuda"):
    """SGLang, about to serve on a GPU; it reserves 1,488 MiB of ``mib`` for its graphs."""
    view = SimpleNamespace(device=device, mem_fraction_static=0.85)
    monkeypatch.setattr(graph_memory, "resolving_view", lambda args: view)
    monkeypatch.setattr(graph_memory, "post_capture_kv_sizing_planned", lambda args: post_capture)
    monkeypatch.setattr(graph_memory, "reserve_for_graph_mb", lambda args: 1488.0)
    monkeypatch.setattr(graph_memory, "get_device_memory_capacity", lambda device: mib)


def shift(**fields):
    return ShiftConfig(**{"world_size": 8, "sp_size": 8, "switching": True, "policy": "calibrated", **fields})


def test_memory_for_graphs_of_both_modes(monkeypatch):
    on_a_gpu_with_graphs(monkeypatch)
    adjustment = adjust_graph_memory(SimpleNamespace(mem_fraction_static=None), shift())
    assert adjustment.fields == {"mem_fraction_static": round(0.85 - 1488 / 98304, 3)}
    assert "0.835 instead of 0.85: 1488 MiB" in adjustment.reason


@pytest.mark.parametrize(
    ("given", "config", "machine"),
    [
        (0.8, {}, {}),
        (None, {"policy": "tokens"}, {}),
        (None, {"policy": "sp", "switching": False}, {}),
        (None, {"graph_buckets": 0}, {}),
        (None, {}, {"post_capture": True}),
        (None, {}, {"device": "cpu"}),
        (None, {}, {"mib": None}),
    ],
    ids=str,
)
def test_when_no_memory_is_reserved_for_a_second_set(monkeypatch, given, config, machine):
    on_a_gpu_with_graphs(monkeypatch, **machine)
    assert adjust_graph_memory(SimpleNamespace(mem_fraction_static=given), shift(**config)).fields == {}


def test_fewer_graphs_are_refused_where_no_memory_is_kept_for_steps_without(monkeypatch):
    on_a_gpu_with_graphs(monkeypatch, post_capture=True)
    with pytest.raises(Refused, match="--shift-graph-buckets 4 leaves steps without a graph"):
        adjust_graph_memory(SimpleNamespace(mem_fraction_static=None), shift(graph_buckets=4))


@pytest.mark.parametrize(("sp", "changed"), [(2, []), (4, []), (8, [12]), (16, [24])])
def test_sglangs_graph_batch_sizes_above_s(sp, changed):
    """Which of SGLang's default sizes between S and 32 are no multiples of S."""
    default = generate_decode_cuda_graph_batch_sizes(resolved(tp_size=2), 512)
    assert [size for size in default if sp < size <= 32 and size % sp] == changed
    adjustment = round_up_sizes(default, sp)
    assert all(size % sp == 0 for size in adjustment)
    assert adjustment == sorted(set(adjustment))
    assert adjustment[-1] == 512


def test_graph_batch_sizes_that_suit_are_kept():
    assert round_up_sizes([2, 4, 8], 2) == [2, 4, 8]
    assert round_up_sizes([1, 2, 10, 12], 4) == [4, 12]
