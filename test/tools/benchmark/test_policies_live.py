"""The script that compares policies on one server: its figures."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from harness import REPO


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [0.5, 4.0, 1.0, 2.5] * 12])
def test_no_percentile_is_more_than_the_largest_value(values, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmark")
    p99 = importlib.import_module("policies_live").p99(values)
    assert p99 <= max(values)
    assert p99 == pytest.approx(np.percentile(values, 99))
