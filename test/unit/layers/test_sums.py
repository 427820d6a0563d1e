"""Which sums of TP an SP step runs: none inside of the region, where rows are complete, except in attention."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang_shift.layers import sp_model
from sglang_shift.layers.sums import SumOfCompleteRows
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.step import Step, run_step

X = torch.tensor([1.0, 2.0])


class Group(GroupCoordinator):
    """One of SGLang's groups, without processes."""

    def __init__(self, world_size=2):
        self.world_size = world_size


@pytest.fixture
def group(monkeypatch):
    """A group whose sum of two ranks with the same tensor is its double."""
    monkeypatch.setattr(GroupCoordinator, "all_reduce", lambda self, x, factor=1: factor * self.world_size * x)
    return Group()


def step_with(group, mode=Mode.SP):
    forwards = Forwards()
    forwards.replace(group, SumOfCompleteRows(group), "all_reduce")
    return Step(mode, None, None, forwards)  # type: ignore[arg-type]


def test_inside_of_the_region_rows_are_complete(group):
    with run_step(step_with(group)) as step:
        step.enter()
        assert group.all_reduce(X) is X


def test_in_attention_a_rank_has_its_heads_as_in_tp(group):
    with run_step(step_with(group)) as step:
        step.enter()
        step.in_attention = True
        assert torch.equal(group.all_reduce(X), 2 * X)
        step.in_attention = False
        assert group.all_reduce(X) is X


def test_before_and_after_the_region_rows_are_those_of_tp(group):
    """The embedding sums before it if a request replaces rows, and a vision tower does. The LM head comes after it."""
    with run_step(step_with(group)) as step:
        assert torch.equal(group.all_reduce(X), 2 * X)
        step.enter()
        step.in_attention = True
        step.leave()
        assert torch.equal(group.all_reduce(X, factor=3), 6 * X), "it takes the arguments of SGLang's method"


def test_a_tp_step_runs_sglangs_sum(group):
    with run_step(step_with(group, Mode.TP)):
        assert "all_reduce" not in vars(group) and torch.equal(group.all_reduce(X), 2 * X)


def test_the_groups_whose_sums_are_replaced(monkeypatch):
    """Groups of one rank sum nothing. SGLang may use one object for several groups."""

    class Parallel:
        tp_group = attn_tp_group = Group()
        moe_tp_group = Group(2)
        moe_ep_group = Group(1)

    monkeypatch.setattr(sp_model, "get_parallel", Parallel)
    assert sp_model._sum_groups() == [Parallel.tp_group, Parallel.moe_tp_group]
