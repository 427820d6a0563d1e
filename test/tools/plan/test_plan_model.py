"""A ``config.json`` is read as SGLang reads it, or refused in a sentence."""

from __future__ import annotations

import csv
import json
from enum import Enum

import pytest
from harness import REPO
from plan_models import CONFIG, config
from sglang.srt.configs.model_config import ModelConfig
from sglang_shift.errors import ShiftError
from sglang_shift.models.families import FAMILIES
from sglang_shift.tools.plan.config import NOT_SERVED, PLANNED, context_of, with_defaults
from sglang_shift.tools.plan.model import read_model

TYPES = {name: family.model_type for name, family in FAMILIES.items()}
FACTORS = [1.0] * 32
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ABSENT = Enum("Mark", "ABSENT").ABSENT  # its text is the same in every process, unlike that of an object()

CHANGES = [
    {},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 1.7}},
    {"rope_scaling": {"type": "dynamic", "factor": 4}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}},
    {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2048}},
    {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": FACTORS, "long_factor": FACTORS}},
    {"rope_scaling": {"type": "su", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 2.0}},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 2048, "rope_theta": 5e5}},
    {"rope_theta": 1e6},
    {"max_position_embeddings": ABSENT},
    {"max_sequence_length": 1000},
    {"seq_length": 3000, "model_max_length": 2000},
    {"max_seq_len": 500, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"head_dim": 96},
    {"head_dim": ABSENT, "num_attention_heads": 32, "num_key_value_heads": ABSENT},
    {"num_key_value_heads": None},
    {"tie_word_embeddings": True},
    {"torch_dtype": "float16"},
    {"torch_dtype": ABSENT},
    {"torch_dtype": ABSENT, "dtype": "bfloat16"},
    {"torch_dtype": "float32"},
]


def write(folder, **changes):
    """As :func:`config`, with null as null."""
    folder.mkdir(exist_ok=True)
    content = {k: v for k, v in (CONFIG | {"sliding_window": None} | changes).items() if v is not ABSENT}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


class TestAsSGLangReadsIt:
    @pytest.mark.parametrize("architecture", TYPES)
    @pytest.mark.parametrize("changes", CHANGES, ids=str)
    def test_a_table_of_configurations(self, tmp_path, architecture, changes):
        folder = write(tmp_path / "m", architectures=[architecture], model_type=TYPES[architecture], **changes)
        try:
            theirs = ModelConfig(str(folder))
        except Exception:  # whatever transformers says of it
            with pytest.raises(ShiftError, match=r"; give the config.json of a decoder as --model"):
                read_model(folder)
            assert architecture == "Phi3ForCausalLM" or changes == {"num_key_value_heads": None}, "no other is refused"
            return
        try:
            ours = read_model(folder)
        except ShiftError as error:  # of ropes that a server refuses as well, the context is read all the same
            assert theirs.hf_config.rope_parameters["rope_type"] in ("dynamic", "longrope", "su"), error
            assert "rope" in str(error)
            assert context_of(with_defaults(json.loads((folder / "config.json").read_text()))) == theirs.context_len
            return
        assert (
            ours.context, ours.layer.head_dim, ours.layer.heads, ours.layer.kv_heads, ours.tied_embeddings, ours.layers,
        ) == (
            theirs.context_len, theirs.head_dim, theirs.num_attention_heads, theirs.get_total_num_kv_heads(),
            theirs.hf_config.tie_word_embeddings, theirs.num_hidden_layers,
        )  # fmt: skip
        assert theirs.dtype.itemsize == 2 and ours.weights == "bfloat16", "two bytes a weight"

    def test_what_the_table_has(self, tmp_path):
        """The rule in numbers: a factor counts where the context before it is not given as well."""
        contexts = {
            "linear": {"type": "linear", "factor": 4.0},
            "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
            "llama3": LLAMA3,
        }
        found = {name: read_model(write(tmp_path / name, rope_scaling=s)).context for name, s in contexts.items()}
        assert found == {"linear": 32768, "yarn": 8192, "llama3": 8192}


def test_the_docs_name_every_architecture():
    docs = (REPO / "docs" / "cost-model.md").read_text()
    assert all(f"`{name}`" in docs for name in PLANNED)


def test_what_cannot_be_divided_is_not_planned(tmp_path):
    with (REPO / "docs" / "data" / "models.csv").open() as file:
        reasons = {row["architecture"]: row["not served because"] for row in csv.DictReader(file)}
    on_gpus = {name for name, reason in reasons.items() if reason and "off GPUs" not in reason}
    assert not on_gpus & {*PLANNED}
    assert {*NOT_SERVED} <= on_gpus
    for name, reason in NOT_SERVED.items():
        folder = write(tmp_path / name, architectures=[name])
        with pytest.raises(ShiftError, match=f"{name} cannot be planned for, because {reason}; give"):
            read_model(folder)


class TestContexts:
    @pytest.mark.parametrize(
        ("architecture", "changes", "window"),
        [
            ("MistralForCausalLM", {"sliding_window": 4096}, 4096),
            ("MistralForCausalLM", {"sliding_window": ABSENT}, 4096),  # its default in transformers
            ("MistralForCausalLM", {"sliding_window": None}, None),
            ("MistralForCausalLM", {"sliding_window": 8192}, None),
            ("Phi3ForCausalLM", {"sliding_window": 2047}, 2047),
            ("Phi3ForCausalLM", {"sliding_window": ABSENT}, None),
            ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": False}, None),
            ("Qwen2ForCausalLM", {"sliding_window": 4096}, None),
            ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2}, 4096),
            ("Qwen3ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4}, None),
            ("LlamaForCausalLM", {"sliding_window": 4096}, None),  # transformers' class has none
        ],
    )
    def test_a_window_must_hold_the_context(self, tmp_path, architecture, changes, window):
        """SGLang's classes for these models attend to all tokens: beyond the window their answers are wrong."""
        folder = write(tmp_path / "m", architectures=[architecture], model_type=TYPES[architecture], **changes)
        if window is not None:
            with pytest.raises(ShiftError, match=f"sliding_window {window}, .*give --context-length {window} or less$"):
                read_model(folder)
            with pytest.raises(ShiftError, match=r"the context of .* would be answered wrongly"):
                read_model(folder, window + 1)
        model = read_model(folder, window)
        assert (model.context, model.context_is_given) == (window or 8192, window is not None)

    def test_more_than_the_model_has_is_refused_as_by_sglang(self, tmp_path):
        folder = write(tmp_path / "m")
        assert read_model(folder, 8192).context == ModelConfig(str(folder), context_length=8192).context_len
        with pytest.raises(ValueError, match="is greater than the derived context_length"):
            ModelConfig(str(folder), context_length=8193)
        with pytest.raises(ShiftError, match="--context-length 8193 is more than the model's 8192; give that or less"):
            read_model(folder, 8193)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"model_type": ABSENT}, "has no 'model_type'"),
            ({"model_type": "gpt5"}, "model_type 'gpt5', which is unknown"),
            ({"architectures": ABSENT}, "has no 'architectures'"),
            ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM' is not a list of names"),
            ({"architectures": [7]}, r"architectures \[7\] is not a list of names"),
            ({"architectures": ["Mistral3ForConditionalGeneration"], "hidden_size": ABSENT, "text_config": CONFIG},
             "Mistral3ForConditionalGeneration, which is none of"),
            ({"text_config": CONFIG}, "text_config, a model inside another"),
            ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 16"),
            ({"hidden_size": 10**12}, "hidden_size 1000000000000 is more than 2147483647"),
            ({"vocab_size": 10**400}, "vocab_size 1000.* is more than"),
            ({"hidden_size": 1000}, "not a multiple of the number of attention heads"),
            ({"head_dim": 0}, "head_dim 0 is not a whole number"),
            ({"rope_scaling": [1]}, "rope_scaling|rope_parameters"),
            ({"rope_scaling": {"type": "linear", "factor": None}}, "no context length"),
            ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "no context length"),
            ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "no context length"),
            ({"rope_scaling": {"type": "linear", "factor": -4}}, "a context of -32768 tokens"),
            ({"rope_scaling": {"type": "linear", "factor": 1e300}}, "a context of .* tokens"),
            ({"max_seq_len": "8k"}, "a context|no context length"),
            ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
            ({"torch_dtype": "foo"}, "dtype foo"),
            ({"dtype": 16, "torch_dtype": ABSENT}, "dtype 16"),
            ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
            ({"quantization_config": [1]}, r"quantization_config \[1\] is not an object"),
            ({"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
             "quantization compressed-tensors, for which"),
            ({"num_local_experts": 8, "architectures": ["MixtralForCausalLM"]}, "experts"),
        ],
    )  # fmt: skip
    def test_in_one_sentence(self, tmp_path, changes, problem):
        folder = write(tmp_path / "m", **{"model_type": "llama", **changes})
        with pytest.raises(ShiftError, match=f"{problem}.*; give the config.json of a decoder as --model") as e:
            read_model(folder)
        assert "\n" not in str(e.value) and len(str(e.value)) < 700

    def test_a_quantization_in_a_file_of_its_own(self, tmp_path):
        """NVIDIA's checkpoints: nothing of it is in the config.json."""
        folder = write(tmp_path / "m", model_type="llama")
        assert read_model(folder).weights == "bfloat16"
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
        with pytest.raises(ShiftError, match=r"hf_quant_config\.json beside it.*; give the config"):
            read_model(folder)

    @pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"[" * 100_000, b"7", b"null", b""])
    def test_what_is_no_json_object(self, tmp_path, content):
        file = config(tmp_path)
        file.write_bytes(content)
        with pytest.raises(ShiftError, match=r"config\.json: .*; give the config.json of a decoder") as error:
            read_model(file)
        assert "\n" not in str(error.value)
