"""Rows inside of the token-sharded region: divided among ranks, gathered and summed, for any number of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness import GlooGroup, run_ranks, topology_over_gloo
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.modes import Mode
from sglang_shift.parallel.layout import padded_local_tokens
from sglang_shift.parallel.region import enter, gather_rows, local_rows, sum_rows
from sglang_shift.parallel.step import Step

TOKENS = (1, 2, 3, 5, 8, 13)
"""Fewer tokens than ranks, as many, and numbers that S does not divide."""
CPU = torch.device("cpu")


class Counting(GlooGroup):
    """Counts its collectives."""

    gathers = 0

    def all_gather_into_tensor(self, output, input):
        self.gathers += 1
        super().all_gather_into_tensor(output, input)


def inside(topology, tokens):
    """A step inside of the region."""
    step = Step(Mode.SP, topology, SimpleNamespace(forward_mode=ForwardMode.DECODE))
    enter(step, tokens, CPU)
    return step


def check_rows(rank: int, world: int, sp: int, shape: tuple[int, ...]) -> None:
    topology = topology_over_gloo(rank, world, sp, Counting)
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        full, step = torch.randn(tokens, *shape, generator=generator), inside(topology, tokens)
        width = padded_local_tokens(tokens, sp)
        padded = F.pad(full.flatten(1) if shape else full[:, None], (0, 0, 0, width * sp - tokens))
        mine = padded[topology.sp_index * width :][:width].view(width, *shape)
        local = local_rows(step, full)
        assert torch.equal(local, mine) and local.is_contiguous()
        gathered = gather_rows(step, local)
        assert torch.equal(gathered, full)
        # The rows of a slice of columns are not contiguous.
        if shape:
            part = gather_rows(step, local[..., :2])
            assert torch.equal(part, full[..., :2])


@pytest.mark.parametrize("shape", [(), (6,), (3, 4)], ids=["1-D", "2-D", "3-D"])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_rows_of_any_shape_are_divided_and_gathered(world, sp, shape):
    run_ranks(world, check_rows, sp, shape)


def check_integers(rank: int, world: int) -> None:
    topology = topology_over_gloo(rank, world, world)
    step = inside(topology, 5)
    ids = torch.tensor([7, 3, 9, 1, 4])
    local = local_rows(step, ids)
    assert local.dtype == torch.int64 and local.tolist() == [[7, 3], [9, 1], [4, 0]][rank]
    assert gather_rows(step, local).tolist() == ids.tolist()


def test_ids_stay_integers():
    run_ranks(3, check_integers)


def check_sums(rank: int, world: int, sp: int, dtype: torch.dtype) -> None:
    topology = topology_over_gloo(rank, world, sp)
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        # Small whole numbers, whose sum is exact in every order and type.
        parts = torch.randint(-8, 8, (world, tokens, 6), generator=generator).to(dtype)
        step = inside(topology, tokens)
        rows = sum_rows(step, parts[rank].clone())
        assert rows.dtype is dtype
        assert torch.equal(rows, local_rows(step, parts.sum(0)))
        assert torch.equal(gather_rows(step, rows), parts.sum(0)), "of all P ranks, and once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_parts_of_all_ranks_are_summed_for_a_ranks_own_tokens(world, sp, dtype):
    run_ranks(world, check_sums, sp, dtype)


def check_repeated_gathers(rank: int, world: int) -> None:
    topology = topology_over_gloo(rank, world, world, Counting)
    group, step = topology.sp_group, inside(topology, 3)
    local, other = torch.ones(2, 4), torch.ones(2, 4)
    rows = gather_rows(step, local)
    assert gather_rows(step, local) is rows and group.gathers == 1, "router and experts read the same rows"
    assert gather_rows(step, other) is not rows and group.gathers == 2, "equal values are other rows"
    assert gather_rows(step, local) is not rows and group.gathers == 3, "only the last rows are kept"
    step.leave()
    assert step.gathered is None, "no row outlives its region"
    gather_rows(step, local)
    assert group.gathers == 4


def test_the_same_rows_are_gathered_once():
    run_ranks(2, check_repeated_gathers)
