"""Which rows enter and leave the token-sharded region, and that they arrive, over gloo."""

from __future__ import annotations

from itertools import accumulate
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import GlooGroup, run_ranks
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner
from sglang.srt.runtime_context import get_forward
from sglang_shift.graphs.runners import SpPrefillGraphRunner
from sglang_shift.layers.logits import ExitToLogits
from sglang_shift.modes import Mode
from sglang_shift.parallel.exchange.gloo import GlooExchange
from sglang_shift.parallel.layout import RankLayout
from sglang_shift.parallel.region import (
    copy_to_device,
    exit_gather,
    padded_local_tokens,
    plan_exit,
    rows_read,
    scatter_tokens,
)
from sglang_shift.parallel.step import Step, current, run_step
from sglang_shift.parallel.topology import Topology
from sglang_shift.runtime.layernorm_sp import runs_sp, sp_entry_scatter
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 6  # of the rows


def batch(**fields):
    defaults = {
        "forward_mode": ForwardMode.EXTEND,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
        "is_prefill_only": False,
        "return_logprob": False,
        "extend_seq_lens_cpu": [3, 1, 4],
        "extend_logprob_start_lens_cpu": [3, 0, 2],
    }
    return SimpleNamespace(**{**defaults, **fields})


def decode():
    """A step of which all rows leave the region."""
    return batch(forward_mode=ForwardMode.DECODE)


def test_prefill_reads_the_last_row_of_each_request():
    assert rows_read(batch()).tolist() == [2, 3, 7]
    assert rows_read(batch(forward_mode=ForwardMode.MIXED)).tolist() == [2, 3, 7]


def test_input_logprobs_read_from_their_start_and_never_no_row():
    # Request 0 starts its logprobs past its chunk, yet samples: its last row is read.
    assert rows_read(batch(return_logprob=True)).tolist() == [2, 3, 6, 7]


def test_rows_of_random_batches():
    random = Random(0)
    for _ in range(200):
        lengths = [random.randint(1, 30) for _ in range(random.randint(1, 9))]
        starts = [random.randint(0, n) for n in lengths]
        ends = list(accumulate(lengths))
        firsts = [end - n + min(start, n - 1) for start, n, end in zip(starts, lengths, ends, strict=True)]
        expected = [row for first, end in zip(firsts, ends, strict=True) for row in range(first, end)]
        fields = {"extend_seq_lens_cpu": lengths, "extend_logprob_start_lens_cpu": starts}
        assert rows_read(batch(return_logprob=True, **fields)).tolist() == expected
        assert rows_read(batch(**fields)).tolist() == [end - 1 for end in ends]


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_mode": ForwardMode.DECODE},
        {"capture_hidden_mode": CaptureHiddenMode.FULL},
        {"capture_hidden_mode": CaptureHiddenMode.LAST},
        {"is_prefill_only": True},
        {"extend_seq_lens_cpu": None},
    ],
)
def test_everything_else_reads_all_rows(fields):
    assert rows_read(batch(**fields)) is None


@pytest.mark.parametrize(("tokens", "size", "local"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (0, 4, 0), (2000, 8, 250)])
def test_padded_local_tokens(tokens, size, local):
    assert padded_local_tokens(tokens, size) == local


def check_entry_and_exit(rank: int, world: int, sp: int) -> None:
    layout = RankLayout(world, sp)
    group = GlooGroup.mine(layout.sp_groups())
    topology = Topology(layout, rank, group, None, GlooExchange(group))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 3, 5, 8, 13, 64):
        full = torch.randn(tokens, 6, generator=generator)
        step = Step(Mode.SP, topology, decode())
        local = scatter_tokens(step, full)
        width = padded_local_tokens(tokens, sp)
        padded = F.pad(full, (0, 0, 0, width * sp - tokens))
        assert torch.equal(local, padded[layout.sp_index(rank) * width :][:width])
        assert torch.equal(exit_gather(step, local), full)
        some = [i for i in range(tokens) if torch.rand((), generator=generator) < 0.3]
        for wanted in (
            [0],
            [tokens - 1],
            list(range(tokens)),
            list(range(0, tokens, 3)),
            [0, tokens - 1][:tokens],
            some,
        ):
            step.exit_plan = plan_exit(torch.tensor(wanted, dtype=torch.int64), tokens, topology, full.device)
            got = exit_gather(step, local)
            assert torch.equal(got[wanted], full[wanted])
            others = [i for i in range(tokens) if i not in wanted]
            assert got.shape == full.shape
            # All rows come along where that costs no more than the wanted ones.
            assert torch.equal(got[others], full[others]) or not got[others].any()


@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_entry_and_exit_over_gloo(world, sp):
    run_ranks(world, check_entry_and_exit, sp)


def check_exit_sends_wanted_rows_only(rank: int, world: int) -> None:
    group = GlooGroup.mine([list(range(world))])
    sent = []

    def recording(output, input):
        sent.append(input.shape[0])
        GlooGroup.all_gather_into_tensor(group, output, input)

    spy = SimpleNamespace(world_size=world, rank_in_group=rank, all_gather_into_tensor=recording)
    layout = RankLayout(world, world)
    topology = Topology(layout, rank, spy, None, GlooExchange(spy))  # type: ignore[arg-type]
    step = Step(Mode.SP, topology, decode())
    local = scatter_tokens(step, torch.arange(100.0)[:, None])
    step.exit_plan = plan_exit(torch.tensor([9, 99]), 100, topology, local.device)
    exit_gather(step, local)
    step.exit_plan = None
    exit_gather(step, local)
    assert sent == [1, 50]


def test_exit_sends_wanted_rows_only():
    run_ranks(2, check_exit_sends_wanted_rows_only)


class Uploads(TorchDispatchMode):
    """Counts the copies from the CPU to the device, which is here PyTorch's meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sources = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if sources and isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.count += 1
        return out


def meta_topology() -> Topology:
    """This process as rank 1 of an SP group of 4 on the meta device; its all-gathers send nothing."""
    group = SimpleNamespace(world_size=4, rank_in_group=1, all_gather_into_tensor=lambda output, input: None)
    return Topology(RankLayout(4, 4), 1, group, None, GlooExchange(group))  # type: ignore[arg-type]


class Processor:
    """Stands for SGLang's logits processor, and returns the hidden states that it gets."""

    def forward(self, input_ids, hidden_states, lm_head, metadata, aux_hidden_states, before_norm):
        assert not current().inside and not get_forward().sp_active, "the LM head is outside of the region"
        return hidden_states, before_norm


def leave(hidden_states):
    return ExitToLogits(Processor())(None, hidden_states, None, None, hidden_states_before_norm=hidden_states.clone())


def test_the_rows_that_leave_are_on_the_device_before_the_first_layer_runs():
    step = Step(Mode.SP, meta_topology(), batch(extend_seq_lens_cpu=[30, 1, 40]))
    with run_step(step), Uploads() as uploads:
        local = sp_entry_scatter(torch.empty(71, WIDTH, device="meta"))
        assert uploads.count == 1, "all that the exit needs goes in one copy"
        gathered, before_norm = leave(local)
        assert uploads.count == 1, "the exit is behind all layers: a copy there waits for them"
    assert gathered.shape == before_norm.shape == (71, WIDTH)


def test_the_exit_behind_a_graph_copies_nothing_either(monkeypatch):
    """The graph has 80 tokens, of which 9 pad the step; its capture copies nothing that would be replayed."""
    runner = SpPrefillGraphRunner.__new__(SpPrefillGraphRunner)
    topology = meta_topology()
    runner.model_runner = SimpleNamespace(
        step=lambda mode, batch, has_exit=True: Step(mode, topology, batch, has_exit=has_exit)
    )
    step, counts = batch(extend_seq_lens_cpu=[30, 1, 40]), []
    step.input_ids = torch.empty(71, device="meta", dtype=torch.int64)

    def capture(runner, forward_batch, num_tokens):
        with Uploads() as uploads:
            local = sp_entry_scatter(torch.empty(num_tokens, WIDTH, device="meta"))
        counts.append(uploads.count)
        return local

    def replay(runner, forward_batch, *args, **kwargs):
        with Uploads() as uploads:
            gathered, _ = leave(torch.empty(20, WIDTH, device="meta"))
        counts.append(uploads.count)
        return gathered

    monkeypatch.setattr(PrefillCudaGraphRunner, "_run_forward", capture)
    monkeypatch.setattr(PrefillCudaGraphRunner, "_execute_body_capture", replay)
    assert runner._run_forward(batch(extend_seq_lens_cpu=[80]), 80).shape[0] == 20
    with run_step(Step(Mode.SP, topology, step)), Uploads() as uploads:
        assert runner._execute_body_capture(step, step, 80).shape[0] == 80
        assert uploads.count == 1
    assert counts == [0, 0]


def test_nothing_waits_for_a_copy_to_a_gpu(monkeypatch):
    """It is from pinned memory, without which a copy that should not block does."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: calls.append((*args, kwargs)) or x)
    rows = torch.arange(3)
    assert copy_to_device(rows, torch.device("cuda")) is rows
    assert calls == ["pinned", (torch.device("cuda"), {"non_blocking": True})]


def test_a_cpu_copies_and_pins_nothing(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    rows = torch.arange(3)
    assert copy_to_device(rows, rows.device) is rows


def test_forwards_outside_of_a_step_are_tp():
    assert current() is None
    assert not runs_sp(ForwardMode.EXTEND)
    assert not runs_sp(ForwardMode.DECODE)


@pytest.mark.parametrize("outer", Mode)
@pytest.mark.parametrize("inner", Mode)
def test_a_step_inside_of_another_is_an_error(outer, inner):
    step = Step(outer, meta_topology(), decode())
    with run_step(step):
        with (
            pytest.raises(RuntimeError, match=f"a step in {inner} begins inside of a step in {outer}"),
            run_step(Step(inner, meta_topology(), decode())),
        ):
            pass
        assert current() is step, "the outer one goes on as it was"
        assert runs_sp(ForwardMode.DECODE) is (outer is Mode.SP)
    assert current() is None


def test_a_step_that_fails_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), run_step(Step(Mode.SP, meta_topology(), decode())):
        get_forward().set("sp_active", True)
        raise ZeroDivisionError
    assert current() is None and not get_forward().sp_active


def check_topologies(rank: int, world: int) -> None:
    """Steps over the whole world, over pairs of ranks, and over the whole world again."""
    groups = [(size, GlooGroup.mine(RankLayout(world, size).sp_groups())) for size in (world, 2, world)]
    full = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(0))
    for size, group in groups:
        layout = RankLayout(world, size)
        topology = Topology(layout, rank, group, None, GlooExchange(group))  # type: ignore[arg-type]
        with run_step(Step(Mode.SP, topology, decode())):
            local = sp_entry_scatter(full)
            assert local.shape[0] == padded_local_tokens(11, size)
            gathered, before_norm = leave(local)
            assert not runs_sp(ForwardMode.DECODE), "SGLang's own exit has nothing to do"
        assert torch.equal(before_norm, full)
        assert torch.equal(gathered, full)


def test_each_step_may_have_another_topology():
    run_ranks(4, check_topologies)
