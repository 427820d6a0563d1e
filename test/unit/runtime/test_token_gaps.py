"""Gaps between the tokens of requests, by a clock of this test."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_shift.runtime.token_gaps import TokenGaps


def request():
    return SimpleNamespace(output_ids=[])


def test_gaps_end_with_the_step_that_brings_a_token():
    clock = iter([1.0, 1.5, 1.75, 3.0, 4.0])
    gaps, a, b, prompt = TokenGaps(lambda: next(clock)), request(), request(), request()
    a.output_ids.append(7)
    assert gaps.take([a, prompt]) == [], "there is no gap before the first token"
    a.output_ids.append(7)
    b.output_ids.append(8)
    assert gaps.take([a, b, prompt]) == [(0.5, 1)]
    for req in (a, b):
        req.output_ids.append(9)
    assert gaps.take([a, b]) == [(0.25, 2)], "requests that decode together have equal gaps"
    b.output_ids += [1, 2, 3]  # drafts that were accepted arrive together
    assert gaps.take([a, b]) == [(1.25, 1)]
    a.output_ids.append(9)  # it was retracted meanwhile
    assert gaps.take([a]) == [(2.25, 1)]
