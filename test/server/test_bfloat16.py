"""bf16: our modes are no further from the float32 reference than stock TP is, within noise."""

from __future__ import annotations

import statistics

import pytest

pytestmark = [pytest.mark.server, pytest.mark.full]


def errors(server, reference) -> float:
    """Mean absolute difference of the prompts' own logprobs to those of float32."""
    differences = []
    for ids, expected in zip(reference.prompts[20::2], reference.input_logprobs, strict=True):
        got = server.generate(ids, 1, logprob_start_len=0).meta["input_token_logprobs"]
        differences += [abs(a[0] - b) for a, b in zip(got[1:], expected, strict=True)]
    return statistics.fmean(differences)


def test_bfloat16_is_no_further_from_float32_than_stock(reference, servers):
    bf16 = ("--dtype", "bfloat16", "--tp-size", "2")
    stock = errors(servers.get(*bf16), reference)
    server = servers.get(*bf16, "--enable-shift-parallel", "--shift-policy", "tokens")
    ours = {}
    for policy in ("tp", "sp"):
        server.flush_cache()
        with server.policy(policy):
            ours[policy] = errors(server, reference)
    print(f"\nmean error of a logprob in bfloat16: stock {stock:.2g}, TP {ours['tp']:.2g}, SP {ours['sp']:.2g}")
    assert stock > 1e-4, "bf16 rounding must be visible for the comparison to mean anything"
    # About 10,000 logprobs: their mean error is stable to a few per cent from one run to the next.
    assert max(ours.values()) <= 1.1 * stock, (stock, ours)
