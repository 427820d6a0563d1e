from __future__ import annotations

import pytest
from sglang_shift.instances.shares import share_out


@pytest.mark.parametrize(
    ("needs", "parts", "owners"),
    [
        ([], 2, []),
        ([5], 2, [0]),
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([1, 9, 1, 8], 2, [1, 0, 0, 1]),
        ([3, 3, 3, 3], 4, [0, 1, 2, 3]),
    ],
)
def test_share_out(needs, parts, owners):
    assert share_out(needs, [9] * parts) == owners


def test_a_part_gets_no_request_that_it_does_not_serve():
    assert share_out([9, 8, 1, 1], [9, 3]) == [0, 0, 1, 1]
    assert share_out([3, 3, 3, 9], [3, 9]) == [0, 0, 0, 1]
