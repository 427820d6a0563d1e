"""A server whose prefills exchange their heads group by group: stock SGLang's answers, and which steps do so."""

from __future__ import annotations

import msgspec
import pytest
from harness import shift_flags
from prompts import assert_same_answers
from sglang_shift.cost.calibration import Calibration

pytestmark = [pytest.mark.server, pytest.mark.full]

# Stock's answers of a model with 8 query heads and 2 KV heads: with 2 ranks there are 4 groups, with 4 ranks 2 groups.
LAYOUTS = [(2, 2), (4, 2)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda p: f"P{p[0]}-S{p[1]}")
def server(request, reference, servers):
    return servers.get(
        *shift_flags(*request.param), "--shift-exchange-pipeline", "on", "--chunked-prefill-size", "256",
        "--enable-mixed-chunk",
    )  # fmt: skip


def pipelined_steps(server) -> int:
    return server.state["exchange_pipeline"]["steps"]


@pytest.mark.parametrize("policy", ["sp", "tokens"])
def test_same_tokens_and_logprobs(server, reference, policy):
    """Prompts of up to 2,000 tokens in chunks of 256, so most chunks have a prefix."""
    server.flush_cache()
    before = pipelined_steps(server)
    with server.policy(policy, threshold=64) as steps:
        answers = server.generate_all(reference.prompts[::4], 4)
    assert_same_answers(answers, [answer.first(8) for answer in reference.answers[1][::4]])
    assert 0 < pipelined_steps(server) - before <= steps["sp"]


def test_logprobs_of_prompts(server, reference):
    server.flush_cache()
    before = pipelined_steps(server)
    with server.policy("sp"):
        for ids, expected in zip(reference.prompts[20::6], reference.input_logprobs[::3], strict=True):
            entries = server.generate(ids, 1, logprob_start_len=0).meta["input_token_logprobs"][1:]
            assert [entry[0] for entry in entries] == pytest.approx(expected, abs=1e-4)
    assert pipelined_steps(server) > before


def test_chunks_beside_decodes(server, reference):
    """Without logprobs SGLang mixes decodes into chunks."""
    prompts, expected = reference.prompts[1::3], reference.answers[1][1::3]
    with server.policy("tokens", threshold=64):
        answers = server.generate_beside_decodes(prompts)
    assert [answer.tokens for answer in answers] == [answer.tokens[:8] for answer in expected]


@pytest.mark.parametrize(("writer", "reader"), [("sp", "tp"), ("tp", "sp")])
def test_prefixes_from_the_radix_cache(server, reference, writer, reader):
    chosen = [i for i, ids in enumerate(reference.prompts) if len(ids) > 200][::4]
    answers, _ = server.generate_in_halves([reference.prompts[i] for i in chosen], writer, reader)
    assert all(answer.meta["cached_tokens"] > 90 for answer in answers)
    assert_same_answers(answers, [reference.answers[1][i].first(8) for i in chosen])


def test_decodes_are_not_pipelined(server, reference):
    ids = reference.prompts[20]
    server.flush_cache()
    before = pipelined_steps(server)
    with server.policy("sp") as steps:
        server.generate(ids, 16)
    assert steps["sp"] > 8
    assert pipelined_steps(server) - before == 1, "the prefill alone"


def test_auto_follows_its_calibration(servers, reference, tmp_path):
    """The calibration of a real server times both ways. Its file says which prefills are pipelined."""
    file = tmp_path / "calibration.json"
    flags = (
        "--dtype", "float32", "--tp-size", "2", "--enable-shift-parallel", "--shift-exchange-pipeline", "auto",
        "--chunked-prefill-size", "512", "--shift-calibration", str(file),
    )  # fmt: skip
    server = servers.get(*flags)
    calibration = msgspec.json.decode(file.read_bytes(), type=Calibration)
    assert [gain.tokens for gain in calibration.exchange_gains] == [64, 128, 256, 512]
    rule = server.state["exchange_pipeline"]
    assert (rule["groups"], rule["first_tokens"]) == (4, calibration.pipelined_from)
    assert rule["steps"] > 0, "the calibration has timed some"
    answers = server.generate_all(reference.prompts[::16], 4)
    assert_same_answers(answers, [answer.first(8) for answer in reference.answers[1][::16]])
    servers.stop()
