"""The histogram of the gaps between tokens."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from sglang_shift.observe.gap_counts import DECADES, FIRST, PER_DECADE, GapCounts, bucket_of, end_of


def test_buckets_hold_their_ends():
    for bucket in range(DECADES * PER_DECADE):
        assert bucket_of(end_of(bucket)) == bucket
        assert bucket_of(end_of(bucket) * 1.001) == bucket + 1
    assert bucket_of(0.0) == bucket_of(FIRST) == 0
    assert bucket_of(1e9) == DECADES * PER_DECADE


def test_a_percentile_is_at_most_ten_percent_too_long():
    numbers = [random.Random(3).lognormvariate(-4, 1.5) for _ in range(2000)]
    gaps = GapCounts()
    for number in numbers:
        gaps.add(number, 1, 0.0)
    for share in (0.5, 0.9, 0.99):
        exact = float(np.percentile(numbers, 100 * share, method="inverted_cdf"))
        assert exact <= gaps.percentile(share) <= 1.101 * exact
    assert gaps.percentile(1.0) == gaps.longest == max(numbers)


def test_a_summary():
    gaps, other = GapCounts(), GapCounts()
    assert gaps.summary() is None
    gaps.add(0.010, 97, 0.0)
    other.add(0.020, 2, 0.1)
    other.add(0.200, 1, 0.1)
    gaps.include(other)
    summary = gaps.summary()
    assert (summary["count"], summary["max"]) == (100, 0.2)
    assert summary["p50"] == pytest.approx(0.01, rel=0.1) and summary["p99"] == pytest.approx(0.02, rel=0.1)
    assert summary["late"] == pytest.approx(1 / 3), "of the gaps that a target applied to"
    assert len(summary["edges"]) == len(summary["counts"]) + 1
    assert all(b == pytest.approx(a * 10 ** (1 / PER_DECADE)) for a, b in pairwise(summary["edges"]))
    at = {
        count: (low, high)
        for count, low, high in zip(summary["counts"], summary["edges"], summary["edges"][1:], strict=False)
    }
    for seconds, count in ((0.010, 97), (0.020, 2), (0.200, 1)):
        low, high = at[count]
        assert low < seconds <= high * (1 + 1e-9)
