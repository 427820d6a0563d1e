"""The records of families, the rule for KV heads, and the page that is made of them."""

from __future__ import annotations

import runpy
from dataclasses import fields

import pytest
import transformers
from harness import REPO
from model_classes import Case
from sglang_shift.models.families import FAMILIES, Window, check_class, family_of
from sglang_shift.models.fields import RULES
from sglang_shift.models.heads import Heads


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_knows_of_windows_what_the_record_says(name):
    own = {field.name for field in fields(transformers.CONFIG_MAPPING[FAMILIES[name].model_type])}
    assert ("sliding_window" in own) is (FAMILIES[name].window is not Window.NONE)
    assert ("layer_types" in own) is (FAMILIES[name].window is Window.SLIDING)


def test_a_family_is_known_by_its_class():
    from sglang.srt.models.llama import Phi3ForCausalLM
    from sglang.srt.models.mixtral import MixtralForCausalLM

    phi = object.__new__(Phi3ForCausalLM)
    assert family_of(phi) is FAMILIES["Phi3ForCausalLM"]
    check_class(phi, "Phi3ForCausalLM")
    assert family_of(object.__new__(MixtralForCausalLM)) is None


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_kv_heads_of_a_rank_are_those_of_sglang(ranks, kv_heads):
    config = Case("LlamaForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": kv_heads}).model_config()
    shard = Heads(8, kv_heads).of_rank(ranks)
    assert shard == Heads(config.get_num_attention_heads(ranks), config.get_num_kv_heads(ranks))


@pytest.mark.parametrize(
    ("ranks", "sp_size", "base"),
    [(4, 2, Heads(16, 4)), (8, 8, Heads(32, 8)), (16, 4, Heads(8, 4)), (16, 16, Heads(32, 16)), (8, 1, Heads(4, 1))],
)
def test_heads_in_base_weights(ranks, sp_size, base):
    """Of 32 and 8: beyond 8 ranks, each shard has its own copy of a KV head."""
    assert Heads(32, 8).of_base_rank(ranks, sp_size) == base
    assert base.qkv == base.query + 2 * base.kv


def test_which_numbers_of_ranks_divide_heads():
    heads = Heads(24, 6)
    assert [n for n in range(1, 25) if heads.divides_queries(n)] == [1, 2, 3, 4, 6, 8, 12, 24]
    assert [n for n in range(1, 25) if heads.divides_kv(n)] == [1, 2, 3, 6, 12, 18, 24]


def test_the_page_is_what_the_command_prints(capsys):
    runpy.run_module("sglang_shift.models", run_name="__main__")
    page = (REPO / "docs" / "models.md").read_text()
    assert page == capsys.readouterr().out, "python -m sglang_shift.models > docs/models.md"
    for family in FAMILIES.values():
        assert f"| {family.title} | `{family.architecture}` | `{family.model_type}` |" in page
    assert all(f"| {rule.subject} | " in page and rule.reason in page for rule in RULES)
