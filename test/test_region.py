"""Which rows leave the token-sharded region, and that they arrive, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import GlooGroup, run_ranks
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang_shift import region as region_module
from sglang_shift.exchange import SequenceExchange
from sglang_shift.layout import RankLayout
from sglang_shift.parallel import SequenceParallel
from sglang_shift.region import exit_gather, padded_local_tokens, region, rows_read, sp_entry_scatter


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


def test_prefill_reads_the_last_row_of_each_request():
    assert rows_read(batch()) == [2, 3, 7]
    assert rows_read(batch(forward_mode=ForwardMode.MIXED)) == [2, 3, 7]


def test_input_logprobs_read_from_their_start_and_never_no_row():
    # Request 0 starts its logprobs past its chunk, yet samples: its last row is read.
    assert rows_read(batch(return_logprob=True)) == [2, 3, 6, 7]


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
    region.parallel = SequenceParallel(layout, rank, group, None, SequenceExchange(group))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 3, 5, 8, 13, 64):
        full = torch.randn(tokens, 6, generator=generator)
        local = sp_entry_scatter(full)
        width = padded_local_tokens(tokens, sp)
        padded = F.pad(full, (0, 0, 0, width * sp - tokens))
        assert torch.equal(local, padded[layout.sp_index(rank) * width :][:width])
        assert torch.equal(exit_gather(local, None), full)
        for wanted in ([0], [tokens - 1], list(range(tokens)), list(range(0, tokens, 3)), sorted({0, tokens - 1})):
            got = exit_gather(local, wanted)
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
    region.parallel = SequenceParallel(layout, rank, spy, None, SequenceExchange(spy))  # type: ignore[arg-type]
    local = sp_entry_scatter(torch.arange(100.0)[:, None])
    exit_gather(local, [9, 99])
    exit_gather(local, None)
    assert sent == [1, 50]


def test_exit_sends_wanted_rows_only():
    run_ranks(2, check_exit_sends_wanted_rows_only)


def test_forwards_outside_of_a_step_are_tp():
    assert not region_module.runs_sp(ForwardMode.EXTEND)
    assert not region_module.runs_sp(ForwardMode.DECODE)
