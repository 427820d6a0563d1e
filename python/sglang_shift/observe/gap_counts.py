"""Counts the gaps between tokens in bounded memory: a histogram with buckets of equal width on a logarithmic scale."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

FIRST = 1e-4
"""The end of the first bucket, in seconds."""
PER_DECADE, DECADES = 24, 7
"""Buckets of a decade, so that an end is 10 % above the one before; and decades. The last bucket has no end."""


class GapCounts:
    """The gaps of some time.

    Attributes:
        counts: The number of gaps in each bucket.
        longest: The longest gap, in seconds.
        bounded: The gaps that a bound applied to.
        late: Those of them that were longer than the bound.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.longest = 0.0
        self.bounded = self.late = 0

    def add(self, seconds: float, count: int, target: float) -> None:
        """Count equal gaps.

        Args:
            seconds: How long each of them was.
            count: How many there were.
            target: The bound that applied to them, in seconds; 0 for none.
        """
        self.counts[bucket_of(seconds)] += count
        self.longest = max(self.longest, seconds)
        if target:
            self.bounded += count
            self.late += count * (seconds > target)

    def include(self, other: GapCounts) -> None:
        """Add the gaps of another time."""
        self.counts.update(other.counts)
        self.longest = max(self.longest, other.longest)
        self.bounded += other.bounded
        self.late += other.late

    def summary(self) -> dict[str, Any] | None:
        """Return all of it as a JSON value; None without gaps. docs/observing.md explains the fields."""
        if not self.counts:
            return None
        first, last = min(self.counts), max(self.counts)
        return {
            "count": self.counts.total(),
            "p50": self.percentile(0.5),
            "p90": self.percentile(0.9),
            "p99": self.percentile(0.99),
            "max": self.longest,
            "late": self.late / self.bounded if self.bounded else None,
            "edges": [end_of(bucket) for bucket in range(first - 1, last + 1)],
            "counts": [self.counts[bucket] for bucket in range(first, last + 1)],
        }

    def percentile(self, share: float) -> float:
        """Return a gap that this share of the gaps does not exceed: the end of its bucket, up to 10 % too long."""
        rest = share * self.counts.total()
        for bucket in sorted(self.counts):
            rest -= self.counts[bucket]
            if rest <= 0:
                return min(self.longest, end_of(bucket))
        return self.longest


def bucket_of(seconds: float) -> int:
    """Return the bucket of a gap. It ends at the gap or after it."""
    place = math.ceil(math.log10(max(seconds, FIRST) / FIRST) * PER_DECADE - 1e-9)
    return min(place, DECADES * PER_DECADE)


def end_of(bucket: int) -> float:
    """Return the longest gap of a bucket, in seconds."""
    return float(FIRST * 10 ** (bucket / PER_DECADE))
