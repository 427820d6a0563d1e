"""Every mode gives stock SGLang's tokens: 64 prompts of 1 to 2,000 tokens, float32, real servers.

(More than two ranks share two cores in CI, and a step of 8 ranks takes a tenth of a second. So 2 ranks get all prompts,
4 ranks every second and 8 ranks every fourth. Where prompts are asked one after the other, 2 ranks get every second,
and more ranks every 16th.)
"""

from __future__ import annotations

import pytest
from harness import TWO_RANKS, shift_flags
from prompts import assert_same_answers

# (P, S): SP only; SP with TP inside, and more ranks than the model's 2 KV heads; the other layouts.
LAYOUTS = [
    pytest.param((2, 2), marks=pytest.mark.server(*TWO_RANKS)),
    pytest.param((4, 2), marks=pytest.mark.server),
    pytest.param((4, 4), marks=[pytest.mark.server, pytest.mark.full]),
    pytest.param((8, 8), marks=[pytest.mark.server, pytest.mark.full]),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda p: f"P{p[0]}-S{p[1]}")
def server(request, reference, servers):
    return servers.get(*shift_flags(*request.param))


@pytest.fixture
def world(request):
    """P."""
    return request.node.callspec.params["server"][0]


@pytest.fixture
def count(world):
    """Tokens to ask for: 3 on 8 ranks."""
    return 8 if world < 8 else 3


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("policy", ["tp", "sp", "tokens"])
def test_same_tokens_and_logprobs(server, reference, policy, concurrency, count, world):
    chosen = slice(None, None, {2: (2, 1), 4: (16, 2), 8: (16, 4)}[world][concurrency == 16])
    with server.policy(policy, threshold=64) as steps:
        answers = server.generate_all(reference.prompts[chosen], concurrency, count)
    assert_same_answers(answers, [answer.first(count) for answer in reference.answers[concurrency][chosen]])
    assert (steps["tp"] > 0, steps["sp"] > 0) == {"tp": (True, False), "sp": (False, True), "tokens": (True, True)}[
        policy
    ]


@pytest.mark.parametrize(("writer", "reader"), [("sp", "tp"), ("tp", "sp")])
def test_kv_written_in_one_mode_is_read_in_the_other(server, reference, writer, reader):
    """A second request hits the radix cache that the other mode wrote, and continues it."""
    prompts = [ids for ids in reference.prompts if len(ids) > 200][::4]
    expected = [a for ids, a in zip(reference.prompts, reference.answers[1], strict=True) if ids in prompts]
    answers, steps = server.generate_in_halves(prompts, writer, reader)
    assert all(a.meta["cached_tokens"] > 50 for a in answers)
    assert steps[writer] == 0 < steps[reader]
    assert_same_answers(answers, expected)


@pytest.mark.parametrize("threshold_mode", ["prefill in SP, decode in TP", "prefill in TP, decode in SP"])
def test_prompt_prefilled_in_one_mode_and_decoded_in_the_other(server, reference, threshold_mode, count, world):
    """One request whose KV cache both modes write; 32 tokens (12) decoded in the mode that did not prefill."""
    step = 1 if world == 2 else 2  # every second one of the reference's
    prompts, count = reference.prompts[:: 8 * step], count * 4
    server.flush_cache()
    if threshold_mode.startswith("prefill in SP"):
        with server.policy("tokens", threshold=1) as steps:
            answers = [server.generate(ids, count) for ids in prompts]
        assert steps["sp"] == sum(len(ids) > 1 for ids in prompts)
    else:
        answers = []
        with server.policy("tokens", threshold=1) as steps:
            for ids in prompts:  # prefill all but the last token in TP, the rest is steps of one token in SP
                server.set_policy("tp")
                server.generate(ids, 1)
                server.set_policy("sp")
                answers.append(server.generate(ids, count))
        assert steps["tp"] == len(prompts)
    assert min(steps.values()) > 0
    assert_same_answers(answers, [answer.first(count) for answer in reference.tokens_64[::step]])
