"""The cost model beside the table that motivates instances: what it says is what the docs say."""

from __future__ import annotations

import pytest
from harness import REPO
from sglang_shift.models.sizes import MIB
from sglang_shift.tools.plan import command, motivation


@pytest.fixture(scope="module")
def rows():
    return motivation.predict()


def test_the_report_is_the_one_in_the_docs(capsys):
    assert command.main(["--check-instances"]) == 0
    assert capsys.readouterr().out in (REPO / "docs" / "cost-model.md").read_text()


def test_what_the_docs_say_of_the_order(rows):
    assert [row.published.ranks for row in rows] == [1, 2, 4]
    assert sorted(rows, key=lambda row: row.context) == rows
    prompts, outputs = ([row.throughputs[kind] for row in rows] for kind in (0, 1))
    assert sorted(prompts, reverse=True) == prompts, "as in the paper"
    assert min(outputs) == outputs[0], "a replica has no memory for many requests at once"


def test_the_contexts_follow_from_two_numbers():
    usable, token = motivation.memory_by_the_contexts()
    weights = motivation.MODEL.sizes.weight_bytes(1, 1, 2)
    for row in motivation.PUBLISHED:
        assert (row.ranks * usable - weights) / token == pytest.approx(row.context, rel=0.05)


def test_the_sizes_of_the_model(rows):
    """32.76 billion parameters in bfloat16, and 256 KiB for K and V of a token: https://huggingface.co/Qwen."""
    sizes = motivation.MODEL.sizes
    assert sizes.weight_bytes(1, 1, 2) == pytest.approx(2 * 32.76e9, rel=0.001)
    assert sizes.kv_bytes_per_token(1, 2) == 256 * 1024
    assert motivation.gpu_of_96_gb().memory_mib * MIB == pytest.approx(96 / 80 * 81559 * MIB, rel=1e-4)
