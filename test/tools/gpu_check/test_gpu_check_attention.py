"""The GPU check of FlashAttention 3, with plain attention in its place, and with kernels that are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from sglang_shift.platforms.attention import Part
from sglang_shift.tools.gpu_check import attention
from sglang_shift.tools.gpu_check.attention import SHAPES, Shape, compare
from sglang_shift.tools.gpu_check.record import Record
from torch_attention import TorchKernels

SMALL = [Shape(8, 1, width=16), Shape(8, 2, width=16, page_size=4, cap=3.0)]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(attention, "LENGTHS", (1, 2, 3, 64, 70, 33))


class OtherBase(TorchKernels):
    """Its log-sum-exp has base 2."""

    def attend_pages(self, *args, **options):
        part = super().attend_pages(*args, **options)
        return Part(part.output, part.lse / math.log(2))


class OneKeyLess(TorchKernels):
    def attend_pages(self, query, keys, values, queries, pages, **options):
        pages = pages._replace(lengths=(pages.lengths - 1).clamp(min=0))
        return super().attend_pages(query, keys, values, queries, pages, **options)


class NextPage(TorchKernels):
    """It reads pages of other requests, or none that was written."""

    def attend_pages(self, query, keys, values, queries, pages, **options):
        return super().attend_pages(query, keys, values, queries, pages._replace(table=pages.table - 1), **options)


class NoCap(TorchKernels):
    def attend_rows(self, *args, cap, **options):
        return super().attend_rows(*args, cap=0.0, **options)


class NoOrder(TorchKernels):
    def attend_rows(self, *args, causal, **options):
        return super().attend_rows(*args, causal=False, **options)


class OtherHeads(TorchKernels):
    def attend_rows(self, query, key, value, *args, **options):
        return super().attend_rows(query, key.flip(1), value, *args, **options)


def record_of(kernels, shapes=SMALL, dtype=torch.float32) -> Record:
    record = Record()
    compare(record, kernels, shapes, dtype, torch.device("cpu"))
    return record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels(dtype):
    record = record_of(TorchKernels(), dtype=dtype)
    assert record.problems == []
    assert [row["call"] for row in record.rows] == 2 * [
        "decode", "queries to prefixes", "chunk", "prefixes to queries",
    ]  # fmt: skip
    assert record.notes[0].startswith("2 shapes: the largest error of an output is ")
    if dtype is torch.float32:
        assert all(max(row["output"], row["lse"]) < 1e-4 for row in record.rows)


@pytest.mark.parametrize(
    ("kernels", "calls"),
    [
        (OtherBase, {"decode", "queries to prefixes"}),
        (OneKeyLess, {"decode", "queries to prefixes"}),
        (NextPage, {"decode", "queries to prefixes"}),
        (NoCap, {"chunk", "prefixes to queries"}),
        (NoOrder, {"chunk"}),
        (OtherHeads, {"chunk", "prefixes to queries"}),
    ],
)
def test_wrong_kernels(kernels, calls):
    problems = record_of(kernels()).problems
    assert {problem.partition(" of Shape(")[0] for problem in problems} == calls


def test_the_shapes():
    """Each with shared and several KV heads, small and large pages, and a cap."""
    assert {shape.kv_heads for shape in SHAPES} == {1, 2} and {shape.page_size for shape in SHAPES} == {1, 16, 64}
    assert {shape.cap for shape in SHAPES} == {0.0, 30.0}


@pytest.mark.parametrize("capability", [(10, 0), (7, 5)])
def test_other_gpus_are_skipped(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(pytest.skip.Exception, match=f"and this GPU has {capability[0]}.{capability[1]}"):
        attention.check_fa3(Record())
