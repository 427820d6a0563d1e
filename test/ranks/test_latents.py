"""The latents of MLA in SP steps: each rank gets those of all tokens, over gloo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from harness import run_ranks, topology_over_gloo
from sglang_shift.layers.latent import GatheredAttention, GatheredLatents
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.region import local_rows, scatter_tokens
from sglang_shift.parallel.step import Step, run_step

HIDDEN = 6


def rows(tokens):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def check_latents(rank: int, world: int, sp: int) -> None:
    topology = topology_over_gloo(rank, world, sp)
    as_tensor = GatheredLatents(lambda x, batch: 2 * x)
    as_linear = GatheredLatents(lambda x: (2 * x, None))
    as_tuple = GatheredLatents(lambda x, batch: (2 * x, x[:, :2]))
    for tokens in (1, 2, 5, 8):
        full, step = rows(tokens), Step(Mode.SP, topology, None, has_exit=False)
        with run_step(step):
            local = scatter_tokens(step, full)
            assert not step.in_attention
            assert torch.equal(as_tensor(local, None), 2 * full)
            assert step.in_attention, "after this, rows are all tokens, with this rank's heads"
            latents, bias = as_linear(local)
            assert bias is None and torch.equal(latents, 2 * full)
            both = as_tuple(local, batch=None)
            assert [each.tolist() for each in both] == [(2 * full).tolist(), full[:, :2].tolist()]


@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 4), (4, 2)])
def test_each_rank_has_the_latents_of_all_tokens(world, sp):
    run_ranks(world, check_latents, sp)


class Attention(torch.nn.Module):
    """An attention module without a method for its latents. Its projection after attention divides tokens again."""

    def forward(self, positions, hidden_states, forward_batch=None):
        assert len(positions) == len(hidden_states)
        return forward_batch.scatter(hidden_states + positions[:, None])


def check_attention(rank: int, world: int, sp: int) -> None:
    topology, attention = topology_over_gloo(rank, world, sp), Attention()
    forwards = Forwards()
    forwards.replace(attention, GatheredAttention(attention))
    for tokens in (1, 2, 5, 8):
        full, positions = rows(tokens), torch.arange(tokens)
        expected = full + positions[:, None]
        step = Step(Mode.SP, topology, None, forwards, has_exit=False)
        batch = SimpleNamespace(scatter=lambda x, step=step: local_rows(step, x))
        with run_step(step):
            local = scatter_tokens(step, full)
            by_name = {"positions": positions, "hidden_states": local, "forward_batch": batch}
            for count in range(4):  # as many arguments are given by their place
                step.in_attention = False
                result = attention(*list(by_name.values())[:count], **dict(list(by_name.items())[count:]))
                assert torch.equal(result, local_rows(step, expected)) and step.in_attention
        whole = SimpleNamespace(scatter=lambda x: x)
        with run_step(Step(Mode.TP, topology, None, forwards)):
            assert torch.equal(attention(positions, full, whole), expected)


@pytest.mark.parametrize(("world", "sp"), [(2, 2), (4, 2)])
def test_an_attention_module_that_reads_all_hidden_states(world, sp):
    run_ranks(world, check_attention, sp)
