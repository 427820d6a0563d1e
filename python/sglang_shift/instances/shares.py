"""Decides which part of an instance that splits continues which request."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(needs: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Give each request to a part that serves it, so that the parts have about as much to hold.

    The largest requests are placed first, each in the part that has least so far. All ranks get the same result.

    Args:
        needs: The tokens that each request takes at most. Some part serves each of them.
        limits: For each part, the tokens of the largest request that it serves.

    Returns:
        The part of each request.
    """
    loads = [0] * len(limits)
    owners = [0] * len(needs)
    for index in sorted(range(len(needs)), key=lambda index: -needs[index]):
        serving = [part for part, limit in enumerate(limits) if needs[index] <= limit]
        owners[index] = min(serving, key=lambda part: loads[part])
        loads[owners[index]] += needs[index]
    return owners
