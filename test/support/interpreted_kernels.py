"""Tests the Triton kernels in Triton's interpreter. test_kernels.py runs it in a process with TRITON_INTERPRET=1.

Triton reads this variable when a kernel is defined, and SGLang defines many kernels. So the tests need their own
process.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from sglang_shift_kernels import gpu, reference
from sglang_shift_kernels.copies import to_rows
from sglang_shift_kernels.layout import Layout
from sglang_shift_kernels.operations import ExchangeShape, operations, traffic
from triton.runtime import interpreter

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGER = {2: torch.int16, 4: torch.int32}
ODD = [(1, 1, 1), (1, 5, 3), (2, 1, 40), (3, 7, 129), (4, 33, 80), (8, 17, 300), (2, 16, 513), (5, 32, 64)]


@pytest.fixture(autouse=True)
def exact_fp8(monkeypatch):
    """Use PyTorch's cast to e4m3. The interpreter's cast rounds halves up, and loses a carry out of the mantissa."""
    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        if target == tl.float8e4nv:
            return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def random_bits(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random bits. They include infinities, subnormals and NaNs of all kinds."""
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def numbers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return numbers of very different sizes, with a row of zeros."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= 10 ** torch.empty(rows, columns).uniform_(-4, 3, generator=generator)
    x[rows // 2] = 0
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = INTEGER.get(a.element_size(), a.dtype)
    return a.dtype == b.dtype and a.is_contiguous() and torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rows", "width"), ODD)
def test_copies_are_exact(size, rows, width, dtype):
    for x in (random_bits(rows, size * width, dtype), random_bits(rows, size * width + 3, dtype)[:, 1:-2]):
        assert same(gpu.pack_heads(x, size), reference.pack_heads(x, size))
    for tokens in {size * rows, size * rows - 1, max(1, size * rows - 2 * rows - 1)}:
        for x in (random_bits(tokens, width, dtype), random_bits(tokens, width + 3, dtype)[:, 1:-2]):
            assert same(gpu.pack_tokens(x, size), reference.pack_tokens(x, size))
    blocks = random_bits(size * rows, width, dtype).view(size, rows, width)
    assert same(gpu.unpack_heads(blocks, dtype), reference.unpack_heads(blocks, dtype))
    assert same(gpu.unpack_tokens(blocks, dtype), reference.unpack_tokens(blocks, dtype))


def test_no_row_is_written_that_is_not_asked_for():
    around = torch.full((9, 20), -1.0)
    x = around[1:8, 2:14]  # 7 rows of 12 columns
    layout = Layout.by_tokens(x, 2)
    to_rows(torch.ones(layout.shape), x, layout)
    assert (x == 1).all() and around.sum() == 7 * 12 - (9 * 20 - 7 * 12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "rows", "width"), [(1, 2, 16), (2, 5, 48), (3, 17, 80), (4, 3, 2064)])
def test_quantized_as_the_reference_does(size, rows, width, dtype):
    heads, tokens = numbers(rows, size * width, dtype), numbers(size * rows - 1, width, dtype)
    for blocks, expected in (
        (gpu.pack_heads(heads, size, True), reference.pack_heads(heads, size, True)),
        (gpu.pack_tokens(tokens, size, True), reference.pack_tokens(tokens, size, True)),
    ):
        assert same(blocks, expected)
        assert same(gpu.unpack_heads(blocks, dtype), reference.unpack_heads(blocks, dtype))
        assert same(gpu.unpack_tokens(blocks, dtype), reference.unpack_tokens(blocks, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_moved(dtype, monkeypatch):
    """``traffic`` reports the bytes that the kernels' masks let through."""
    moved_bytes = 0
    load, store = (getattr(interpreter.InterpreterBuilder, f"create_masked_{what}") for what in ("load", "store"))

    def bytes_of(pointers, mask):
        return int(mask.data.sum()) * interpreter._get_np_dtype(pointers.get_element_ty()).itemsize

    def counted_load(self, pointers, mask, *rest):
        nonlocal moved_bytes
        moved_bytes += bytes_of(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        nonlocal moved_bytes
        moved_bytes += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counted_store)
    examples = list(operations(ExchangeShape(size=3, rows=19, qkv=80, o=48), dtype))
    assert len(examples) == 7
    for operation in examples:
        moved_bytes = 0
        result = operation.run(gpu)
        assert same(result, operation.run(reference)), operation.name
        assert moved_bytes == traffic(operation.arguments[0], result).total_bytes, operation.name
