"""Measures the gaps between the tokens of requests, as the scheduler sees them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any


class TokenGaps:
    """The gaps that end with a step. Only the first rank measures them.

    A gap is the time between two steps that brought tokens of a request. Tokens of one step arrive together. SGLang's
    own metric is measured behind the detokenizer. There, a request that does not stream shows its tokens 50 at a time,
    so each gap is a mean of 50.

    Args:
        clock: Seconds. It is the same clock for all ranks of a machine, because requests travel between instances.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock

    def take(self, reqs: Iterable[Any]) -> list[tuple[float, int]]:
        """Return the gaps that end now, and the number of requests that had each. Call it after each step."""
        now = self.clock()
        gaps: Counter[float] = Counter()
        for req in reqs:
            tokens = len(req.output_ids)
            before, at = getattr(req, "shift_last_token", (0, now))
            if tokens > before:
                if before:
                    gaps[now - at] += 1
                req.shift_last_token = tokens, now
        return sorted(gaps.items())
