"""The GPU check of quantized linears, on a CPU with references in the place of SGLang's kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import run_ranks
from quantized_kernels import install
from sglang_shift.tools.gpu_check import quantized
from sglang_shift.tools.gpu_check.formats import FORMATS, KINDS, Sizes
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.weights import one_gemm

CPU = torch.device("cpu")
STEPS = (1, 5)
SIZES = Sizes()


def check(name: str, kind: str, sizes: Sizes = SIZES) -> Record:
    record = Record()
    quantized.check_linear(record, name, kind, sizes, CPU, STEPS)
    return record


def check_formats(rank: int, world: int) -> None:
    install()
    for name in ("fp8, blocks of 64", "compressed-tensors int8", "gptq_marlin, desc_act"):
        for kind in KINDS:
            record = check(name, kind)
            assert record.problems == []
            assert [row["rows"] for row in record.rows] == list(STEPS)
            assert all(row["error"] == 0 and row["us"] > 0 and row["us of a shard"] > 0 for row in record.rows)
            gemms = FORMATS[name].columns if kind != "down" else "a GEMM for each shard"
            assert {row["gemms"] for row in record.rows} == {gemms}
            strided = [note for note in record.notes if "a strided weight is refused" in note]
            assert len(strided) == ("marlin" not in name), "the references want what SGLang's kernels want"


def test_formats_that_are_right():
    """Each check runs in a process of its own, because the references stay in place."""
    run_ranks(1, check_formats)


def check_as_many_scales_as_columns(rank: int, world: int) -> None:
    """As with Llama-8B: 4096 inputs in blocks of 64 by 64 have as many scales as outputs."""
    install()
    sizes = Sizes(hidden=64 * 64, head=128, heads=4, kv_heads=2, intermediate=256)
    for name in ("fp8, blocks of 64", "blockwise_int8"):
        for kind in ("qkv", "gate_up"):
            record = check(name, kind, sizes)
            assert record.problems == []
            assert {(row["gemms"], row["error"]) for row in record.rows} == {("one GEMM", 0)}


def test_as_many_scales_as_columns():
    run_ranks(1, check_as_many_scales_as_columns)


def check_more_gemms(rank: int, world: int) -> None:
    install()
    one_gemm.METHODS -= {"W8A8Int8LinearMethod"}
    record = check("w8a8_int8", "qkv")
    assert record.problems == ["w8a8_int8, qkv: SP runs a GEMM for each shard instead of one GEMM"]
    assert check("w8a8_int8", "down").problems == [], "it has a GEMM for each shard in any case"


def test_more_gemms_than_a_format_needs():
    run_ranks(1, check_more_gemms)


def check_what_is_timed(rank: int, world: int) -> None:
    install()
    packed, seconds_of = [], quantized.seconds_of

    def timed(run, device):
        if run.func is quantized.product_of_shard:
            layer, part, _ = run.args
            packed.append(part.is_contiguous() and part.shape[1] == layer.input_size_per_partition)
        return seconds_of(run, device)

    quantized.seconds_of = timed
    check("w8a8_int8", "down")
    assert packed == [True] * len(STEPS), "a step in TP does not copy its part of the input"


def test_the_time_of_a_shard_has_no_copy_of_its_input():
    run_ranks(1, check_what_is_timed)


def check_wrong_kernel(rank: int, world: int) -> None:
    install()
    right = quantized.product_of_sp
    quantized.product_of_sp = lambda stacked, x: right(stacked, x) * 1.5
    (first, _) = check("w8a8_int8", "qkv").problems
    assert first == "w8a8_int8, qkv, 1 rows: differs by 0.5 of its norm (one GEMM)"

    quantized.product_of_sp = failing(RuntimeError("misaligned\naddress"))
    assert check("w8a8_int8", "qkv").problems[0] == "w8a8_int8, qkv, 1 rows: RuntimeError: misaligned address"


def test_a_kernel_that_is_wrong_on_stacked_shards():
    run_ranks(1, check_wrong_kernel)


def failing(error: Exception) -> Callable[..., None]:
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize("error", [ImportError("no module"), NotImplementedError("not on this GPU")])
def test_a_kernel_that_this_machine_lacks(error, monkeypatch):
    monkeypatch.setattr(quantized, "rank_of_tp", failing(error))
    with pytest.raises(pytest.skip.Exception, match="qkv: SGLang has no kernel here"):
        check("w8a8_int8", "qkv")


def test_a_kernel_that_fails_in_sglang_itself(monkeypatch):
    monkeypatch.setattr(quantized, "rank_of_tp", failing(RuntimeError("illegal\naddress")))
    try:
        record = check("w8a8_int8", "qkv")
    except pytest.skip.Exception as reason:
        pytest.fail(f"it was skipped: {reason}")
    assert record.problems == ["w8a8_int8, qkv: SGLang itself fails here: RuntimeError: illegal address"]


class TestAllFormats:
    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setattr(quantized, "publish_settings", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def test_nothing_compared(self, monkeypatch):
        monkeypatch.setattr(quantized, "check_linear", failing(pytest.skip.Exception("no kernel")))
        record = Record()
        with pytest.raises(pytest.skip.Exception, match="no format was compared"):
            quantized.check(record)
        assert record.notes[-1] == "checked: nothing"

    def test_all_failed(self, monkeypatch):
        monkeypatch.setattr(quantized, "check_linear", lambda record, *_: record.problem("it fails"))
        record = Record()
        quantized.check(record)
        assert set(record.problems) == {"it fails"}, "a check with problems has failed"

    def test_one_compared(self, monkeypatch):
        def compare(record, name, *_):
            if name != "awq":
                pytest.skip("no kernel")
            record.row(format=name)

        monkeypatch.setattr(quantized, "check_linear", compare)
        record = Record()
        quantized.check(record)
        assert record.notes[-1] == "checked: awq" and record.problems == []
