"""--instances: the settings that follow, and what is refused, before any process is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.configs.model_config import AttentionArch
from sglang_shift.args.instances import FEATURES, check_instance_model, check_instances, divisible_tokens
from sglang_shift.args.server_args import ShiftServerArgs
from sglang_shift.config import ShiftConfig
from sglang_shift.errors import Refused
from sglang_shift.launch_server import resolve
from sglang_shift.models.demo import demo_model_path
from sglang_shift.resolution import shift_config_of

TWO = {"tp_size": 2, "instances": 2}


def resolved(**fields):
    args = ShiftServerArgs(**{"model_path": demo_model_path(), **fields})
    resolve(args)
    return args


@pytest.mark.parametrize(
    ("fields", "policy"),
    [({}, "tp"), ({"sp_size": 2}, "sp"), ({"enable_shift_parallel": True, "shift_policy": "tokens"}, "tokens")],
)
def test_the_configuration(fields, policy):
    args = resolved(**TWO, **fields)
    config = shift_config_of(args)
    assert (config.world_size, config.sp_size, config.instances, config.policy) == (2, 2, 2, policy)
    assert shift_config_of(args) == config, "the resolution does not change what follows from it"


def test_ranks_can_hold_the_weights_together():
    """The check of S comes before that of the KV heads, of which the demo model has 2."""
    with pytest.raises(Refused, match="at least one KV head for each of the 8 ranks"):
        resolved(tp_size=8, instances=2, sp_size=4)


def test_the_kv_cache_can_be_divided():
    assert resolution_result(resolved(**TWO, max_total_tokens=1024), "max_total_tokens") == 1023
    args = resolved(**TWO)
    assert (resolution_result(args, "max_total_tokens") + 1) % 2 == 0
    assert resolution_result(resolved(tp_size=2, sp_size=2, max_total_tokens=1024), "max_total_tokens") == 1024


@pytest.mark.parametrize(("tokens", "page", "instances"), [(1023, 1, 2), (1024, 1, 8), (1000, 16, 4), (64, 16, 2)])
def test_divisible_tokens(tokens, page, instances):
    result = divisible_tokens(tokens, page, instances)
    pages, rest = divmod(result + page, page)
    assert result <= tokens and rest == 0 and pages % instances == 0
    assert (tokens - result) < page * instances, "no more than one page of each instance is left out"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tp_size": 2, "instances": 1}, "--instances 1 does not divide --tp-size 2"),
        ({"tp_size": 2, "instances": 4}, "--instances 4 does not divide --tp-size 2"),
        ({"tp_size": 6, "instances": 2}, "with --tp-size a power of two"),
        ({**TWO, "merge_levels": "3"}, "--merge-levels 3 is not possible: 3 is not one of 1, 2; give numbers"),
        ({**TWO, "merge_levels": "two"}, "--merge-levels two is not possible: 'two' is not a list of numbers"),
        (
            {"tp_size": 8, "instances": 4, "sp_size": 2},
            "--sp-size 2 cannot be combined with --instances 4, because each",
        ),
        ({**TWO, "instance_policy": "auto"}, "--instance-policy auto needs step times, and --shift-policy tp has none"),
        (
            {**TWO, "instance_policy": "auto", "enable_shift_parallel": True, "shift_calibration": "off"},
            "leave out --shift-calibration off",
        ),
        ({"tp_size": 2, "sp_size": 2, "merge_levels": "2"}, "--merge-levels 2 needs --instances"),
        ({"tp_size": 2, "sp_size": 2, "merge_weights": "free"}, "--merge-weights free needs --instances"),
        ({**TWO, "sp_size": 2, "merge_weights": "free"}, "--merge-weights free cannot be combined with --sp-size,"),
        (
            {**TWO, "enable_shift_parallel": True, "instance_policy": "auto", "merge_weights": "free"},
            "--merge-weights free cannot be combined with --instance-policy auto,",
        ),
        (
            {**TWO, "enable_shift_parallel": True, "shift_policy": "sp", "merge_weights": "free"},
            "--merge-weights free cannot be combined with --shift-policy sp,",
        ),
        ({"tp_size": 4, "instances": 4}, "at least one KV head for each of the 4 ranks, but the model has 2"),
        (
            {**TWO, "enable_hierarchical_cache": True},
            "--enable-hierarchical-cache cannot be combined with --instances 2",
        ),
        (
            {**TWO, "load_balance_method": "total_requests"},
            "--load-balance-method other than auto and round_robin cannot be combined with --instances 2",
        ),
        ({**TWO, "skip_tokenizer_init": True}, "--skip-tokenizer-init cannot be combined with --instances 2"),
        ({**TWO, "lora_paths": ["a=/x"]}, "--enable-lora cannot be combined with --instances 2"),
    ],
)
def test_what_is_refused(fields, why):
    with pytest.raises(Refused) as error:
        resolved(**fields)
    assert why in str(error.value) and "\n" not in str(error.value)


CONFIG = ShiftConfig(2, 2, switching=False, policy="tp", instances=2)


ASKING = [
    {"dp_size": 2}, {"nnodes": 2}, {"load_balance_method": "total_tokens"},
    {"dcp_size": 2}, {"ep_size": 2}, {"enable_hierarchical_cache": True},
    {"device": "cuda"}, {"enable_deterministic_inference": True}, {"disable_radix_cache": True},
    {"radix_cache_backend": "mine"}, {"enable_lmcache": True},
    {"enable_hisparse": True}, {"enable_unified_memory": True}, {"enable_kv_cache_sharding": True},
    {"kv_cache_dtype": "fp8_e4m3"}, {"enable_lora": True}, {"speculative_algorithm": "NGRAM"},
    {"disaggregation_mode": "decode"}, {"enable_streaming_session": True}, {"enable_memory_saver": True},
    {"enable_prefill_delayer": True}, {"kv_events_config": "{}"}, {"skip_tokenizer_init": True},
    {"shift_tbt_target": 10.0, "merge_weights": "free"},
    {"shift_sparse_prefill": 0.01}, {"strip_thinking_cache": True},
]  # fmt: skip


def test_each_feature_is_refused():
    plain = resolved(**TWO)
    values = {name: resolution_result(plain, name) for name in plain.__struct_fields__}
    check_instances(SimpleNamespace(**values), CONFIG)
    assert len(ASKING) == len(FEATURES)
    for feature, fields in zip(FEATURES, ASKING, strict=True):
        with pytest.raises(Refused) as error:
            check_instances(SimpleNamespace(**{**values, **fields}), CONFIG)
        assert str(error.value).startswith(feature.name)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"quantization": "fp8"}, "its weights are quantized"),
        ({"attention_arch": AttentionArch.MLA}, "MLA"),
        ({"num_experts": 8}, "it has experts"),
        ({"is_hybrid_swa": True}, "a sliding window"),
        ({"is_multimodal": True}, "images or sounds"),
        ({"is_generation": False}, "generates no text"),
    ],
)
def test_models_that_are_refused(fields, why):
    def model(**fields):
        text = SimpleNamespace(architectures=["Some"], num_experts=fields.pop("num_experts", None))
        values = {
            "quantization": None, "attention_arch": AttentionArch.MHA, "is_hybrid_swa": False, "is_multimodal": False,
            "is_generation": True, "hf_config": text, "get_total_num_kv_heads": lambda: 2,
        }  # fmt: skip
        return SimpleNamespace(**{**values, **fields})

    check_instance_model(model(), CONFIG)
    with pytest.raises(Refused, match=why):
        check_instance_model(model(**fields), CONFIG)
