"""What the GPU check computes: shapes, bytes and FLOPs against closed formulae, verdicts, comparisons of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from sglang_shift.tools.gpu_check import answers, links
from sglang_shift.tools.gpu_check.answers import Answer, compare
from sglang_shift.tools.gpu_check.gemms import Cost, verdict
from sglang_shift.tools.gpu_check.kernels import exchanges
from sglang_shift.tools.gpu_check.shapes import DEPLOYMENTS, PROJECTIONS, Deployment, Matrix

LLAMA_70B = DEPLOYMENTS[0]


def test_the_shards_of_llama_70b():
    assert LLAMA_70B.shards == {
        "qkv": Matrix(8 * 128 + 2 * 128, 8192, 8192),
        "o": Matrix(8192, 8 * 128, 64 * 128),
        "gate_up": Matrix(2 * 28672 // 8, 8192, 8192),
        "down": Matrix(8192, 28672 // 8, 28672),
    }
    assert LLAMA_70B.widths == (1280, 1024)
    assert [LLAMA_70B.shards[name].is_view for name in PROJECTIONS] == [False, True, False, True]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda d: d.name)
def test_base_weights_are_s_shards(deployment):
    for name, shard in deployment.shards.items():
        base = deployment.bases[name]
        assert base.outputs * base.inputs == deployment.sp * shard.outputs * shard.inputs
        assert base.stride == base.inputs == shard.stride, "a shard is a slice of its base weight"
    layer, base_tp = deployment.layer, deployment.ranks // deployment.sp
    # Without replicated KV heads a base configuration is stock TP = P/S.
    held = sum(m.outputs * m.inputs for m in deployment.bases.values())
    assert layer.kv_heads >= deployment.ranks and held * base_tp == layer.parameters


def test_flops_and_bytes_of_a_product():
    matrix = Matrix(outputs=3, inputs=5, stride=10)
    assert matrix.flops(7) == 2 * 7 * 3 * 5
    assert matrix.traffic(7, element_bytes=1) == 7 * 5 + 3 * 5 + 2 * 7 * 3
    assert matrix.contiguous == Matrix(3, 5, 5) and not matrix.contiguous.is_view


def test_bytes_that_a_rank_sends():
    whole = LLAMA_70B.sent_bytes(1000, element_bytes=2)
    assert whole == {"tp": 2 * 2 * 7 / 8 * 1000 * 8192 * 2, "sp": 7 * 125 * (1280 + 1024) * 2}
    part = replace(LLAMA_70B, sp=4).sent_bytes(1001, element_bytes=2)
    rows = math.ceil(1001 / 4)
    assert part["sp"] == 3 * rows * (1280 + 1024) * 2 + 2 * 2 * 1 / 2 * rows * 8192 * 2


def test_the_exchanges_that_kernels_are_checked_at():
    found = exchanges()
    assert found[8, 1280, 1024] == "Llama-70B" and found[4, 1280, 1024] == "Llama-70B"
    assert found[2, 3072, 2048] == "Llama-8B"


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    assert links.bus_share("all-reduce", 8) == 2 * 7 / 8 and links.bus_share("all-to-all", 8) == 7 / 8
    assert links.SIZES[0] == 8 and links.SIZES[-1] == 2**30


def test_a_table_of_links():
    rows = [{"operation": "a", "bytes": 8, "us": 1.0}, {"operation": "b", "bytes": 64, "us": 2.0}]
    heading, first, second = links.table(2, rows).splitlines()
    assert heading.split() == ["2", "GPUs:", "bytes", "a,", "us", "b,", "us"]
    assert first.split() == ["8", "1.0"] and second.split() == ["64", "2.0"]


def test_the_verdict_on_views():
    copy = 1e-4
    costs = [
        Cost("L", "o", 1, 1.2 * copy, copy),
        Cost("L", "o", 16, copy, copy),
        Cost("L", "down", 1, 1.04 * copy, copy),
    ]
    text, table = verdict(costs, "bfloat16")
    assert "free (up to 1.05 x a copy's time, or 1 us more) in 2 of 3 cases" in text
    assert "dearest: L, o, 1 tokens: 1.20 x, which argues for a copy there" in text
    assert [line.split()[-2:] for line in table.splitlines()] == [["1", "16"], ["1.20", "1.00"], ["1.04", "refused"]]
    assert "dearest" not in verdict(costs[1:], "bfloat16")[0]
    assert verdict([], "fp8") == ["fp8: no view was taken: every such shard would need a contiguous copy"]


def test_what_events_do_not_resolve_is_free():
    assert Cost("L", "o", 1, 5.9e-6, 5e-6).is_free and not Cost("L", "o", 1, 6.1e-6, 5e-6).is_free


def answer(tokens, logprobs=None, prompt=()):
    logprobs = logprobs or [-1.0] * len(tokens)
    places = [{token: logprob, 99: logprob - 0.05} for token, logprob in zip(tokens, logprobs, strict=True)]
    return Answer(list(tokens), logprobs, places, list(prompt))


class TestAnswers:
    reference = [answer([1, 2, 3], prompt=[-2.0, -3.0])]  # noqa: RUF012

    def test_the_same(self):
        found = compare([answer([1, 2, 3], [-1.01, -1.0, -1.0], [-2.0, -3.02])], self.reference, 0.1)
        assert (found.compared, found.ties, found.problems) == (3, 0, [])
        assert found.worst == pytest.approx(0.02)

    def test_a_tie_ends_an_answer(self):
        found = compare([answer([1, 99, 7], prompt=[-2.0, -3.0])], self.reference, 0.1)
        assert (found.compared, found.ties, found.problems) == (1, 1, [])

    def test_a_tie_that_is_none(self):
        found = compare([answer([1, 99, 7], prompt=[-2.0, -3.0])], self.reference, 0.01)
        assert found.problems == ["answer 0, token 1: 99 instead of 2"]

    def test_another_token(self):
        found = compare([answer([1, 2, 8], prompt=[-2.0, -3.0])], self.reference, 0.1)
        assert found.problems == ["answer 0, token 2: 8 instead of 3"]

    @pytest.mark.parametrize("wrong", [-1.2, math.nan])
    def test_another_logprob(self, wrong):
        found = compare([answer([1, 2, 3], [-1.0, wrong, -1.0], [-2.0, -3.0])], self.reference, 0.1)
        assert found.problems == [f"answer 0, token 1: a logprob of {wrong:.4f} instead of -1.0000"]

    def test_prompts(self):
        found = compare([answer([1, 2, 3], prompt=[-2.0, -3.5])], self.reference, 0.1)
        assert found.problems == ["prompt 0, token 2: a logprob of -3.5000 instead of -3.0000"]
        found = compare([answer([1, 2, 3])], self.reference, 0.1)
        assert found.problems == ["answer 0 has 0 prompt logprobs, not 2"]

    def test_the_questions(self):
        asked = answers.make_prompts(vocabulary=50)
        assert asked == answers.make_prompts(vocabulary=50) and max(map(max, asked)) < 50
        assert len(asked[0]) == 1 and len(asked[-1]) == answers.LONGEST_PROMPT
        plain, with_prompts = answers.requests(asked)
        assert "logprob_start_len" not in plain and with_prompts["logprob_start_len"] == 0

    def test_what_a_server_says(self):
        meta = {
            "output_token_logprobs": [[-1.0, 7, None]],
            "output_top_logprobs": [[[-1.0, 7, None], [-2.0, 8, None]]],
            "input_token_logprobs": [[None, 3, None], [-4.0, 5, None]],
        }
        assert Answer.of({"output_ids": [7], "meta_info": meta}) == Answer([7], [-1.0], [{7: -1.0, 8: -2.0}], [-4.0])


def test_deployments_have_names_of_their_own():
    assert len({d.name for d in DEPLOYMENTS}) == len(DEPLOYMENTS)
    assert isinstance(DEPLOYMENTS[-1], Deployment) and DEPLOYMENTS[-1].name == "Llama-8B, P=2, S=2"
