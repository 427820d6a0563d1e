"""Routed experts in SP steps against the whole computation, over gloo, with small stand-ins for SGLang's modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from harness import GlooGroup, run_ranks, topology_over_gloo
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_shift.layers.experts import Experts, ReplicatedExperts, Router
from sglang_shift.layers.sums import SumOfCompleteRows
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.region import exit_gather, gather_rows, local_rows, scatter_tokens
from sglang_shift.parallel.step import Step, run_step
from sglang_shift.weights.stacked import stack_shards

HIDDEN, WIDTH, EXPERTS, CHOSEN = 8, 12, 5, 2
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


class TopK(torch.nn.Module):
    """Stands for SGLang's router: weights and numbers of the chosen experts of each token."""

    def forward(self, hidden_states, router_logits, *, scale=1.0):
        assert len(hidden_states) == len(router_logits)
        weights, ids = router_logits.softmax(-1).topk(CHOSEN)
        return scale * weights, ids


class FusedMoE(torch.nn.Module):
    """Stands for SGLang's experts: a part of each expert, whose products are a part of the sum.

    Args:
        up: ``[experts, HIDDEN, columns of this rank]``.
        down: ``[experts, columns of this rank, HIDDEN]``.
    """

    def __init__(self, up, down):
        super().__init__()
        self.up = torch.nn.Parameter(up.contiguous(), requires_grad=False)
        self.down = torch.nn.Parameter(down.contiguous(), requires_grad=False)

    def forward(self, hidden_states, topk_output):
        weights, ids = topk_output
        assert len(ids) == len(hidden_states), "every token has its choice"
        products = torch.einsum("th,ehn->ten", hidden_states, self.up).relu()
        products = torch.einsum("ten,enh->teh", products, self.down)
        chosen = products.gather(1, ids[..., None].expand(-1, -1, HIDDEN))
        return hidden_states.copy_((weights[..., None] * chosen).sum(1))  # SGLang's experts may write into their input


class Block(torch.nn.Module):
    """A block of a mixture of experts. It sums the parts of the ranks itself, as some of SGLang's blocks do."""

    def __init__(self, gate, topk, experts, group):
        super().__init__()
        self.gate, self.topk, self.experts, self.group = gate, topk, experts, group

    def forward(self, x):
        choice = self.topk(x, x @ self.gate, scale=0.5)
        return self.group.all_reduce(self.experts(x, choice))


class Alone:
    """A group of one rank."""

    @staticmethod
    def all_reduce(x):
        return x


def whole_weights():
    generator = torch.Generator().manual_seed(0)
    shapes = (HIDDEN, EXPERTS), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN), (13, HIDDEN)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


class Counting(GlooGroup):
    """Counts its collectives."""

    gathers = exchanges = 0

    def all_gather_into_tensor(self, output, input):
        self.gathers += 1
        super().all_gather_into_tensor(output, input)

    def all_to_all_single(self, output, input):
        self.exchanges += 1
        super().all_to_all_single(output, input)


def check_experts(rank: int, world: int, sp: int, replicated: bool) -> None:
    topology = topology_over_gloo(rank, world, sp, Counting)
    counts = topology.sp_group
    everyone = GlooGroup.mine([list(range(world))])
    gate, up, down, x = whole_weights()
    whole = Block(gate, TopK(), FusedMoE(up, down), Alone)
    block = Block(gate, TopK(), FusedMoE(up.chunk(world, 2)[rank], down.chunk(world, 1)[rank]), everyone)
    forwards = Forwards()
    if replicated:
        forwards.replace(block.experts, ReplicatedExperts(block.experts, stack_shards(block.experts, topology)))
    else:
        forwards.replace(block.topk, Router(block.topk))
        forwards.replace(block.experts, Experts(block.experts))
    # Sharded, the rows and the router's logits are gathered once, and the parts are summed once.
    expected = (0, 0) if replicated else (2, 1)
    forwards.replace(everyone, SumOfCompleteRows(everyone), "all_reduce")  # type: ignore[arg-type]
    for tokens in (1, 2, 5, 8, 13):
        full = whole(x[:tokens].clone())
        with run_step(Step(Mode.TP, topology, None, forwards)):
            assert torch.allclose(block(x[:tokens].clone()), full, **CLOSE)
        step = Step(Mode.SP, topology, SimpleNamespace(forward_mode=ForwardMode.DECODE), forwards)
        with run_step(step):
            local = scatter_tokens(step, x[:tokens])
            before = counts.gathers, counts.exchanges
            given = local.clone()
            rows = block(given)
            assert (counts.gathers - before[0], counts.exchanges - before[1]) == expected
            real = max(0, min(tokens - topology.sp_index * len(local), len(local)))
            assert rows.shape == local.shape
            assert torch.allclose(rows[:real], local_rows(step, full)[:real], **CLOSE)
            assert torch.equal(given, local), "a shared expert may read the rows after the routed ones"
            assert torch.equal(gather_rows(step, given), x[:tokens]), "what the experts overwrote is gathered anew"
            assert torch.allclose(exit_gather(step, rows), full, **CLOSE)
            # The next layer's rows are other rows, and are gathered anew.
            again = exit_gather(step, block(rows))
            assert torch.allclose(again, whole(full.clone()), **CLOSE)


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "replicated"])
@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_experts_that_ranks_divide(world, sp, replicated):
    run_ranks(world, check_experts, sp, replicated)
