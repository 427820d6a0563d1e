"""The kernels compiled for GPUs that are not here, and the package they come in."""

from __future__ import annotations

import re

import pytest
import triton
from harness import REPO
from setuptools.config.pyprojecttoml import read_configuration
from sglang_shift_kernels.copies import copy_kernel
from sglang_shift_kernels.fp8 import dequantize_kernel, quantize_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
LAYOUT = dict.fromkeys(("rows", "tokens", "width", "block_stride", "row_stride"), "i32")
NOT_SPECIALIZED = ("rows", "tokens")


@pytest.fixture(autouse=True)
def no_earlier_result(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, architecture: int, pointers: dict[str, str], **constants) -> triton.compiler.CompiledKernel:
    """As the launch functions have it compiled where the width is a multiple of 16."""
    signature = {**pointers, **LAYOUT, **dict.fromkeys(constants, "constexpr")}
    aligned = [name for name in (*pointers, *LAYOUT) if name not in NOT_SPECIALIZED]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    assert f".target sm_{architecture}" in result.asm["ptx"] and result.asm["cubin"]
    return result


def accesses(ptx: str, operation: str) -> set[int]:
    """Sizes in bytes of the loads (``ld``) or stores (``st``) of global memory."""
    found = re.findall(rf"{operation}\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize("to_blocks", [True, False])
@pytest.mark.parametrize("integer", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies_compile(architecture, integer, to_blocks):
    pointers = dict.fromkeys(("x", "blocks"), f"*{integer}")
    columns = 512 // (int(integer[1:]) // 8)
    ptx = compiled(copy_kernel, architecture, pointers, TO_BLOCKS=to_blocks, ROWS=16, COLUMNS=columns).asm["ptx"]
    assert accesses(ptx, "ld") == accesses(ptx, "st") == {16}, "memory is read and written 16 bytes at a time"


@pytest.mark.parametrize("floating", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_compiles_where_there_is_fp8(architecture, floating):
    pointers = {"x": f"*{floating}", "elements": "*fp8e4nv", "scales": "*fp32"}
    tile = {"ROWS": 1, "COLUMNS": 2048}
    if architecture < 89:
        for kernel in (quantize_kernel, dequantize_kernel):
            with pytest.raises(triton.CompilationError, match="fp8e4nv not supported"):
                compiled(kernel, architecture, pointers, **tile)
        return
    ptx = compiled(quantize_kernel, architecture, pointers, **tile).asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx, "rounded by the hardware, to the nearest"
    assert accesses(ptx, "ld") == {16} and min(accesses(ptx, "st")) >= 4
    ptx = compiled(dequantize_kernel, architecture, pointers, **tile).asm["ptx"]
    assert "cvt.rn.f16x2.e4m3x2" in ptx and max(accesses(ptx, "st")) == 16


def test_both_packages_are_installed():
    project = read_configuration(REPO / "pyproject.toml", ignore_option_errors=True)
    tools = project["tool"]["setuptools"]
    assert {"sglang_shift", "sglang_shift.tools.benchmark", "sglang_shift_kernels"} <= set(tools["packages"])
    assert "py.typed" in tools["package-data"]["sglang_shift_kernels"]
