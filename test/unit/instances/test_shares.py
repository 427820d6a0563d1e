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
    assert share_out(needs, parts) == owners
