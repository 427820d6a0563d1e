"""What the GPU check runs on a GPU, on the CPU as far as it goes: layers of an all-alike group, GEMMs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sglang_shift.args.gemm_backend import SPLIT_K
from sglang_shift.models.decoder_layer import Layer
from sglang_shift.modes import Mode
from sglang_shift.tools.gpu_check import dispatch, gemms, graphs, steps
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.gpu_check.shapes import Deployment, Matrix
from sglang_shift.tools.gpu_check.stack import Batch, ReplicatedGroup, Stack
from sglang_shift.tools.gpu_check.timing import error_of

CPU = torch.device("cpu")
LAYER = Layer(hidden=64, intermediate=96, heads=8, kv_heads=4, head_dim=8)
BATCHES = (Batch(8, 1, context=5), Batch(8, 3))
SIZES = [(2, 2), (4, 4), (4, 2), (8, 8), (8, 4), (2, 1)]


def small(ranks: int, sp: int) -> Deployment:
    return Deployment("small", LAYER, layers=2, ranks=ranks, sp=sp)


@pytest.mark.parametrize(("ranks", "sp"), SIZES)
def test_both_modes_of_an_all_alike_group_give_the_same(ranks, sp):
    record = Record()
    graphs.check_modes_agree(record, small(ranks, sp), torch.float32, CPU, 1e-5, BATCHES, layers=2)
    assert record.problems == [] and [row["tokens"] for row in record.rows] == [8, 24]


@pytest.mark.parametrize("batch", BATCHES)
def test_without_sequence_parallelism_sp_is_tp_bit_by_bit(batch):
    stack = Stack(small(2, 1), 2, batch, torch.float32, CPU)
    x = stack.input(Mode.TP)
    assert torch.equal(stack.run(x, Mode.SP), stack.run(x, Mode.TP))


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
def test_a_wrong_base_weight_is_seen(name, monkeypatch):
    real = Stack._linears

    def broken(self):
        linears = real(self)
        linears[name].projection.base.weight[-5:, -5:] += 1  # of another rank's shard, which TP does not read
        return linears

    monkeypatch.setattr(Stack, "_linears", broken)
    record = Record()
    graphs.check_modes_agree(record, small(4, 2), torch.float32, CPU, 1e-5, BATCHES, layers=1)
    # A rank's own attention does not read what its QKV projection gives for others.
    assert len(record.problems) == (0 if name == "qkv" else len(BATCHES)), record.problems


@pytest.mark.parametrize(("ranks", "sp"), [(4, 4), (4, 2)])
def test_the_bytes_that_a_step_sends_are_those_of_the_formula(ranks, sp):
    deployment = small(ranks, sp)
    stack, sent = Stack(deployment, 2, Batch(8, 3), torch.float32, CPU), []
    group, exchange = stack.topology.sp_group, ReplicatedGroup.all_to_all_single

    def counting(output, input):
        sent.append(input.nbytes * (sp - 1) // sp)
        exchange(group, output, input)

    group.all_to_all_single = counting
    stack.run(stack.input(Mode.SP), Mode.SP)
    rows, base_tp = 24 // sp, ranks // sp
    all_reduces = 4 * rows * LAYER.hidden * 4 * (base_tp - 1) / base_tp
    assert sum(sent) == 2 * (deployment.sent_bytes(24, 4)["sp"] - all_reduces)


def test_tp_weights_are_views_of_base_weights():
    stack = Stack(small(4, 2), 1, BATCHES[0], torch.float32, CPU)
    for name, linear in stack.layers[0].linears.items():
        shard, base = stack.deployment.shards[name], linear.projection.base.weight
        assert linear.weight.shape == (shard.outputs, shard.inputs) and linear.weight.stride() == (shard.stride, 1)
        assert linear.weight.data_ptr() == base.data_ptr() and base.shape == (
            stack.deployment.bases[name].outputs,
            stack.deployment.bases[name].inputs,
        )


def test_a_step_is_timed_in_both_modes():
    record = Record()
    rows = steps.measure(record, small(4, 2), Batch(8, 3), CPU, torch.float32, layers=2)
    assert rows == record.rows and [row["mode"] for row in rows] == ["tp", "sp"]
    for row in rows:
        assert (row["phase"], row["tokens"], row["requests"]) == ("prefill", 24, 8)
        assert row["bytes_sent_per_layer"] == small(4, 2).sent_bytes(24, 4)[row["mode"]]
        # A deployment of 2 layers, both of which were timed.
        assert row["eager_ms_all_layers"] == pytest.approx(2 * row["eager_us_per_layer"] / 1e3, abs=0.01)
    heading, *body = steps.table("small", rows).splitlines()
    assert heading.startswith("small:") and len(body) == 2


@pytest.mark.parametrize("sp", [2, 4, 8])
def test_the_steps_that_are_timed_can_be_shared(sp):
    for batch in steps.batches(sp):
        assert batch.requests % sp == 0 and batch.phase == ("decode" if batch.context else "prefill")


class TestGemms:
    def test_the_matrices_of_both_modes(self):
        record, deployment = Record(), small(4, 2)
        costs = list(gemms.measure(record, deployment, torch.float32, CPU, steps=(1, 5)))
        assert record.problems == []
        assert {(c.projection, c.tokens) for c in costs} == {(n, t) for n in ("o", "down") for t in (1, 5)}
        by_held = {(r["projection"], r["held"], r["tokens"]): r for r in record.rows}
        assert len(by_held) == len(record.rows) == 2 * (2 * 4 + 2)
        for (name, held, tokens), row in by_held.items():
            shard, base = deployment.shards[name], deployment.bases[name]
            matrix = {"shard": shard.contiguous, "view": shard, "base": base}[held]
            assert (row["n"], row["k"], row["stride"]) == (matrix.outputs, matrix.inputs, matrix.stride)
            assert row["m"] == (-(-tokens // 2) if held == "base" else tokens)
            rate = 2 * row["m"] * row["n"] * row["k"] / (row["us"] / 1e6) / 1e12
            assert row["tflops"] == pytest.approx(rate, rel=0.1, abs=0.011)

    def test_a_view_that_gives_something_else(self, monkeypatch):
        monkeypatch.setattr(gemms, "product", _as_if_contiguous)
        record = Record()
        list(gemms.measure(record, small(4, 2), torch.float32, CPU, steps=(5,)))
        assert len(record.problems) == 2 and "differs by" in record.problems[0]

    @pytest.mark.parametrize("error", [RuntimeError, ValueError])
    def test_a_view_that_is_refused(self, error, monkeypatch):
        def product(x, weight):
            if not weight.is_contiguous():
                raise error("must be\ncontiguous")
            return F.linear(x, weight)

        monkeypatch.setattr(gemms, "product", product)
        record = Record()
        assert list(gemms.measure(record, small(4, 2), torch.float32, CPU, steps=(5,))) == []
        refused = [row for row in record.rows if "refused" in row]
        assert [row["refused"] for row in refused] == ["must be contiguous"] * 2 and record.problems == []
        assert {row["held"] for row in refused} == {"view"}

    def test_a_copy_that_is_refused(self, monkeypatch):
        def product(x, weight):
            if weight.is_contiguous():
                raise RuntimeError("no kernel")
            return F.linear(x, weight)

        monkeypatch.setattr(gemms, "product", product)
        record = Record()
        assert list(gemms.measure(record, small(4, 2), torch.float32, CPU, steps=(5,))) == []
        assert [row["held"] for row in record.rows if "us" in row] == ["view"] * 2 and record.problems == []


def _as_if_contiguous(x, weight):
    """A kernel that overlooks the distance of a weight's rows."""
    return F.linear(x, weight.as_strided(weight.shape, (weight.shape[1], 1)))


class TestDispatch:
    @pytest.fixture(autouse=True)
    def _few_views(self, monkeypatch):
        monkeypatch.setattr(dispatch, "views", lambda: [Matrix(16, 8, 32)])
        monkeypatch.setattr(dispatch, "ROWS", (1, 5))

    def found(self, multiply, calls=None) -> Record:
        record = Record()
        dispatch.check_views(record, multiply, [] if calls is None else calls, "made up", CPU)
        return record

    def test_right(self):
        record = self.found(F.linear)
        assert record.problems == []
        found = [(row["held"], row["m"], row["kernel"]) for row in record.rows]
        assert found == [(held, rows, "cuBLAS") for held in ("view", "copy") for rows in (1, 5)]

    def test_wrong(self):
        problems = self.found(lambda x, weight, bias: _as_if_contiguous(x, weight)).problems
        assert len(problems) == 2 and "(view): differs by" in problems[0] and "of its norm" in problems[0]

    def test_refused(self):
        def refuse(x, weight, bias):
            if not weight.is_contiguous():
                raise ValueError("b must be packed column-major")
            return F.linear(x, weight)

        problems = self.found(refuse).problems
        assert len(problems) == 2 and "ValueError: b must be packed" in problems[0]

    def test_a_kernel_for_packed_weights_that_runs_on_a_view(self):
        calls = []
        record = self.found(lambda x, weight, bias: calls.append("gemv") or F.linear(x, weight), calls)
        assert {row["kernel"] for row in record.rows} == {"gemv"}
        assert len(record.problems) == 2 and "(view): gemv runs, which wants adjacent rows" in record.problems[0]

    def on_hopper(self, monkeypatch, runs: Callable[[int, int, int], bool]) -> Record:
        """The whole check, with a function in the place of SGLang's kernel for one row."""
        from sglang.srt.layers.quantization import unquant

        def initialize():
            if unquant.get_exec().kernel.bf16_gemm_backend == "cutedsl":
                raise ValueError("it needs another GPU")
            if unquant.get_exec().kernel.bf16_gemm_backend == "gemv":
                unquant._hopper_bf16_gemv, unquant._use_hopper_bf16_gemv = F.linear, runs

        check_views = dispatch.check_views
        monkeypatch.setattr(dispatch, "check_views", lambda *given: check_views(*given[:-1], CPU))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(unquant, "initialize_bf16_gemm_config", initialize)
        record = Record()
        dispatch.check(record)
        return record

    def test_sglangs_kernel_runs_on_copies_only(self, monkeypatch):
        record = self.on_hopper(monkeypatch, lambda m, n, k: m == 1)
        assert record.problems == []
        assert record.notes == [
            "auto: products with a view: 2 by cuBLAS",
            "auto: products with a copy: 2 by cuBLAS",
            "gemv: products with a view: 2 by cuBLAS",
            "gemv: products with a copy: 1 by gemv, 1 by cuBLAS",
            "cutedsl: skipped: ValueError: it needs another GPU",
            "checked: auto, gemv",
        ]

    def test_a_kernel_that_never_runs(self, monkeypatch):
        record = self.on_hopper(monkeypatch, lambda m, n, k: False)
        assert record.problems == ["gemv: SGLang runs gemv for none of the copies, so the check says nothing about it"]

    def test_no_backend(self, monkeypatch):
        from sglang.srt.layers.quantization import unquant

        def initialize():
            raise ImportError("a package is missing")

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(unquant, "initialize_bf16_gemm_config", initialize)
        with pytest.raises(pytest.skip.Exception, match="no backend was checked"):
            dispatch.check(Record())

    def test_sglangs_choice_is_as_it_was(self):
        from sglang.srt.layers.quantization import unquant

        before = dict(vars(unquant))
        with dispatch.backend(unquant, "torch") as calls:
            assert unquant.get_bf16_gemm_backend() is unquant.Bf16GemmBackend.TORCH
            record = Record()
            dispatch.check_views(record, unquant._bf16_gemm_dispatch_impl, calls, "torch", CPU)
            assert record.problems == []
        assert dict(vars(unquant)) == before

    def test_products_that_a_server_switches_off_are_not_checked(self, monkeypatch):
        from sglang.srt.layers.quantization import unquant

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
        monkeypatch.setenv(SPLIT_K, "0")
        monkeypatch.delenv(SPLIT_K)  # the check sets it, and monkeypatch takes it back
        enabled = []

        def look(*_):
            enabled.append(unquant.should_enable_bf16_splitk_gemm(unquant.Bf16GemmBackend.CUTEDSL))

        monkeypatch.setattr(dispatch, "check_views", look)
        dispatch.check(Record())
        assert enabled and not any(enabled)

    def test_a_backend_for_other_gpus(self):
        from sglang.srt.layers.quantization import unquant

        before = dict(vars(unquant))
        with pytest.raises(pytest.skip.Exception, match="SM100"), dispatch.backend(unquant, "cutedsl"):
            pass
        assert dict(vars(unquant)) == before


def test_the_views_that_are_checked():
    found = dispatch.views()
    assert Matrix(8192, 1024, 8192) in found and Matrix(8192, 3584, 14336) in found
    assert all(view.is_view for view in found) and len(set(found)) == len(found)


def test_an_error_over_the_norm():
    expected = torch.tensor([3.0, 4.0])
    assert error_of(expected, expected) == 0.0
    assert error_of(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert not error_of(torch.tensor([3.0, float("nan")]), expected) <= 1.0
