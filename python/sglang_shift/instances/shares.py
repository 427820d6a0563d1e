"""Decides which part of an instance that splits continues which request."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(needs: Sequence[int], parts: int) -> list[int]:
    """Give each request to a part, so that the parts have about as much to hold.

    The largest requests are placed first, each in the part that has least so far. All ranks get the same result.

    Args:
        needs: The tokens that each request takes at most.
        parts: The number of parts.

    Returns:
        The part of each request.
    """
    loads = [0] * parts
    owners = [0] * len(needs)
    for index in sorted(range(len(needs)), key=lambda index: -needs[index]):
        owners[index] = min(range(parts), key=lambda part: loads[part])
        loads[owners[index]] += needs[index]
    return owners
