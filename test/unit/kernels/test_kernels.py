"""Packing and unpacking: what they mean, on a CPU, in Triton's interpreter, and what fp8 loses."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sglang_shift_kernels as kernels
import torch
from harness import SUPPORT
from sglang_shift_kernels import copies, cpu, gpu, reference
from sglang_shift_kernels.operations import ExchangeShape, Traffic, operations, traffic, warm_up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_kernels_in_the_interpreter():
    file = SUPPORT / "interpreted_kernels.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and "skipped" not in run.stdout, run.stdout + run.stderr


def all_to_all(sent: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank receives: ``sent[i][j]`` goes from rank i to rank j."""
    return list(torch.stack(sent).transpose(0, 1).contiguous())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "tokens"), [(1, 3), (2, 1), (2, 37), (3, 64), (4, 6)])
def test_an_exchange_and_back(size, tokens, dtype, fp8):
    """Small integers have few bits: fp8 loses none of them."""
    width, rows = 32, -(-tokens // size)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 9, (size * rows, size * width), generator=generator).to(dtype)
    whole[tokens:] = 0  # padding
    mine = whole.split(rows)
    my_heads = whole.split(width, 1)
    received = all_to_all([kernels.pack_heads(x, size, fp8=fp8) for x in mine])
    for blocks, expected in zip(received, my_heads, strict=True):
        assert torch.equal(kernels.unpack_tokens(blocks, dtype), expected)
    received = all_to_all([kernels.pack_tokens(x[:tokens], size, fp8=fp8) for x in my_heads])
    for blocks, expected in zip(received, mine, strict=True):
        assert torch.equal(kernels.unpack_heads(blocks, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        ExchangeShape(2, 1, 16, 16),
        ExchangeShape(3, 8, 48, 80),
        ExchangeShape(2, 9, 7, 5),
        ExchangeShape(4, 65, 160, 32),
    ],
)
def test_cpu_gives_what_the_reference_gives(shape, dtype):
    names = set()
    for operation in operations(shape, dtype):
        result = operation.run(cpu)
        assert torch.equal(result, operation.run(reference)), operation.name
        assert result.is_contiguous()
        names.add(operation.name)
    assert len(names) == (3 if shape.qkv == 7 else 7)


def test_the_kernels_serve_cuda_tensors_and_no_others():
    assert kernels._implementation(torch.empty(1)) is cpu
    assert kernels._implementation(SimpleNamespace(is_cuda=True)) is gpu


@pytest.mark.parametrize("implementation", [gpu, cpu])
def test_nothing_is_copied_where_a_view_will_do(implementation):
    x = torch.randn(6, 8)
    blocks = implementation.pack_tokens(x, 3)
    assert blocks.shape == (3, 2, 8) and traffic(x, blocks) == Traffic(0, 0)
    rows = implementation.unpack_tokens(blocks, torch.float32)
    assert torch.equal(rows, x) and traffic(blocks, rows) == Traffic(0, 0)
    blocks = implementation.pack_heads(x[:1], 4)
    assert torch.equal(blocks, x[0].view(4, 1, 2)) and traffic(x[:1], blocks) == Traffic(0, 0)
    row = implementation.unpack_heads(blocks, torch.float32)
    assert torch.equal(row, x[:1]) and traffic(blocks, row) == Traffic(0, 0)


def test_traffic():
    x = torch.zeros(3, 2 * 32, dtype=torch.bfloat16)
    plain, quantized = kernels.pack_heads(x, 2), kernels.pack_heads(x, 2, fp8=True)
    assert traffic(x, plain) == Traffic(2 * 3 * 64 * 2, 2 * 3 * 64 * 2)
    elements, scales = 3 * 64 * 3, 3 * 2 * 4
    assert traffic(x, quantized) == Traffic(elements + 4 * scales, elements + scales)
    back = kernels.unpack_heads(quantized, torch.bfloat16)
    assert traffic(quantized, back) == Traffic(elements + scales, elements + scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fp8_loses(dtype):
    """At most half a step of e4m3: 1/16 of an element, or 2^-10 of a scale that is at most 2^-7 of the largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2 * 64, generator=generator)
    x *= 10 ** torch.empty(x.shape).uniform_(-8, 1, generator=generator)
    x = x.to(dtype)
    blocks = x.view(256, 2, 64).double()
    back = kernels.unpack_heads(kernels.pack_heads(x, 2, fp8=True), dtype).view(256, 2, 64).double()
    error = (back - blocks).abs()
    largest = blocks.abs().amax(-1, keepdim=True)
    relative, absolute = blocks.abs() / 16, (largest * 2.0**-17).expand_as(blocks)
    assert (error <= relative.maximum(absolute)).all()
    small = blocks.abs() < largest * 2.0**-14
    assert (error > relative / 2)[~small].any() and (error > absolute / 4)[small].any()  # it is not much less
    assert (error <= relative)[blocks.abs() >= largest * 2.0**-13].all()
    assert torch.equal(back, back.to(torch.bfloat16).double())  # no rounding on top


def test_extreme_rows_as_fp8():
    rows = torch.zeros(5, 16)
    rows[1], rows[2, 0], rows[3, 3], rows[4, 3] = 1e-40, 3.0e38, float("inf"), float("nan")
    back = kernels.unpack_heads(kernels.pack_heads(rows, 1, fp8=True), torch.float32)
    assert not back[0].any() and not back[1].any()
    assert back[2, 0] == pytest.approx(3.0e38, rel=1 / 16) and not back[2, 1:].any()
    assert not back[3, 3].isfinite() and back[4, 3].isnan()
    half = torch.empty(1, 16, dtype=torch.float16)
    for value, finite in ((63_456.0, True), (63_488.0, False)):
        half.fill_(value)
        back = kernels.unpack_heads(kernels.pack_heads(half, 1, fp8=True), torch.float16)
        assert bool(back.isfinite().all()) is finite


@pytest.mark.parametrize("implementation", [gpu, cpu])
def test_what_cannot_be_packed(implementation):
    x = torch.randn(4, 12)
    for call, message in (
        (lambda: implementation.pack_heads(x, 5), "12 columns cannot be packed for 5 ranks"),
        (lambda: implementation.pack_heads(x.T, 2), "whose rows are contiguous"),
        (lambda: implementation.pack_tokens(x[0], 2), "whose rows are contiguous"),
        (lambda: implementation.pack_tokens(x, 0), "for 0 ranks"),
        (lambda: implementation.pack_heads(x, 2, True), "6 columns of torch.float32 cannot be sent as fp8"),
        (lambda: implementation.pack_tokens(torch.ones(2, 16, dtype=torch.int32), 2, True), "floating-point"),
        (lambda: implementation.unpack_heads(x, torch.float32), "contiguous blocks"),
        (lambda: implementation.unpack_heads(x.view(2, 2, 12), torch.float16), "type of the rows"),
        (lambda: implementation.unpack_tokens(x.view(4, 3, 4)[:, :2], torch.float32), "contiguous blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_where_fp8_is_supported(monkeypatch):
    assert kernels.fp8_supported(torch.device("cpu")) and not kernels.fp8_supported(torch.device("xpu"))
    for capability, supported in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert kernels.fp8_supported(torch.device("cuda")) is supported


@pytest.mark.parametrize("fp8", [False, True])
def test_a_warm_up_launches_what_a_step_may(monkeypatch, fp8):
    launches: set[tuple[object, ...]] = set()
    monkeypatch.setattr(
        copies, "_launch", lambda x, blocks, layout, to_blocks: launches.add(("copy", to_blocks, layout.width))
    )
    monkeypatch.setattr(
        gpu.fp8, "_launch", lambda kernel, x, blocks, layout: launches.add((kernel.__name__, layout.width))
    )
    warm_up(ExchangeShape(4, 2, 160, 128), 512, torch.bfloat16, "cpu", fp8)
    warmed = launches.copy()
    for rows in (2, 65):  # a step of T tokens: QKV, O with and without padding, the embedding
        for tokens in (4 * rows, 4 * rows - 1):
            gpu.unpack_tokens(gpu.pack_heads(torch.zeros(rows, 4 * 160).bfloat16(), 4, fp8), torch.bfloat16)
            gpu.unpack_heads(gpu.pack_tokens(torch.zeros(tokens, 128).bfloat16(), 4, fp8), torch.bfloat16)
            gpu.pack_tokens(torch.zeros(tokens, 512).bfloat16(), 4)
    assert launches == warmed and ("copy", True, 512) in warmed
    assert any("quantize" in str(launch[0]) for launch in warmed) is fp8
