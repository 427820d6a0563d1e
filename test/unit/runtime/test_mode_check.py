"""How the check of the modes compares logits, and what it takes for rounding."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sglang_shift.errors import Refused
from sglang_shift.modes import Mode
from sglang_shift.runtime import mode_check
from sglang_shift.runtime.exchange_pipeline import ExchangePipeline
from sglang_shift.runtime.mode_check import ATTEMPTS, LENGTHS, MARGIN, ModeCheck, Trace, distance, noisy_linears

VOCABULARY = 50


def test_the_prompts_do_not_fill_the_ranks_evenly():
    assert sum(LENGTHS) % 2 == 1 and len(LENGTHS) > 1 and 1 in LENGTHS


def test_distance_is_relative_to_the_spread_of_a_row_and_takes_the_worst_row():
    reference = torch.tensor([[1.0, -1.0], [101.0, 99.0]])
    assert distance(reference, reference) == 0
    assert distance(reference + torch.tensor([[0.0, 0.0], [1.0, -1.0]]), reference) == pytest.approx(1.0)
    assert distance(reference.flip(0), reference) > 1


def test_equal_rows_without_spread_have_no_distance():
    assert distance(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


class Check(ModeCheck):
    """A check whose steps are made up. ``differences`` and ``noise`` are by attempt."""

    def __init__(self, differences, noise, room=True, agree=lambda numbers: numbers):
        self.differences, self.noise, self.noisy = list(differences), noise, False
        self.bench = SimpleNamespace(make_room=lambda shape: room, agree=agree)
        self.runner = SimpleNamespace(model=object(), exchange_pipeline=ExchangePipeline())
        self.scheduler = SimpleNamespace(
            model_config=SimpleNamespace(vocab_size=VOCABULARY),
            tp_group=SimpleNamespace(all_gather_object=lambda mine: ["", mine]),
        )
        self.attempts = []

    def _trace(self, modes, ids):
        if ids not in self.attempts:
            self.attempts.append(ids)
        row = torch.tensor([[1.0, -1.0]]) / 2**0.5  # of norm 1
        moved = self.noise if self.noisy else 0.0
        if Mode.SP in modes:
            moved = self.differences[len(self.attempts) - 1]
        logits = row + moved * row
        return Trace(logits, {"layers.0.attn": logits, "layers.1.attn": row + 2 * moved * row})


@pytest.fixture(autouse=True)
def noise_marks_the_check(monkeypatch):
    """In place of noise in the linears: the check's own mark, which its made-up steps read."""

    @contextmanager
    def noisy(runner, seed):
        noisy.check.noisy = True
        try:
            yield
        finally:
            noisy.check.noisy = False

    monkeypatch.setattr(mode_check, "noisy_linears", noisy)
    return noisy


def run(check, noise_marks_the_check):
    noise_marks_the_check.check = check
    return check.run()


def test_rounding_is_no_difference(noise_marks_the_check):
    check = Check([1e-5], noise=1e-5)
    assert "SP is within 1.0 times what rounding explains" in run(check, noise_marks_the_check)
    assert len(check.attempts) == 1


def test_a_router_may_round_to_another_expert_once(noise_marks_the_check):
    check = Check([1e-2, 1e-5], noise=1e-5)
    assert "the same" in run(check, noise_marks_the_check)
    assert len(check.attempts) == 2


def test_a_difference_in_every_attempt_is_refused_with_the_first_layer(noise_marks_the_check):
    check = Check([2 * MARGIN * 1e-3] * ATTEMPTS, noise=1e-3)
    with pytest.raises(Refused, match=r"in SP as in TP .* first difference is at layers\.0\.attn"):
        run(check, noise_marks_the_check)
    assert len(check.attempts) == ATTEMPTS


def test_the_worst_rank_decides(noise_marks_the_check):
    check = Check([0.0] * ATTEMPTS, noise=1e-5, agree=lambda numbers: [1.0, *numbers[1:]])
    with pytest.raises(Refused):
        run(check, noise_marks_the_check)


def test_not_a_number_in_sp_alone_is_a_difference(noise_marks_the_check):
    with pytest.raises(Refused):
        run(Check([float("nan")] * ATTEMPTS, noise=1e-5), noise_marks_the_check)


def test_logits_of_tp_that_are_not_finite_compare_with_nothing(noise_marks_the_check):
    check = Check([1e-5], noise=1e-5)
    trace = check._trace
    check._trace = lambda modes, ids: replace(trace(modes, ids), logits=torch.full((1, 2), math.inf))
    assert "not compared" in run(check, noise_marks_the_check)


def test_a_pool_without_room_is_said(noise_marks_the_check):
    assert "no room" in run(Check([1.0], noise=0.0, room=False), noise_marks_the_check)


@pytest.mark.parametrize(("dtype", "terms"), [(torch.float32, 64), (torch.bfloat16, 4)])
def test_noise_has_the_size_of_rounding(monkeypatch, dtype, terms):
    """In float32 a product of 64 terms; in bfloat16 the sum of the parts of 4 ranks."""
    monkeypatch.undo()
    linear = torch.nn.Identity()
    linear.input_size = 64
    forward = linear.forward
    linear.forward = lambda x: (forward(x), None)
    runner = SimpleNamespace(
        topology=SimpleNamespace(layout=SimpleNamespace(world_size=4), exchange=SimpleNamespace(fp8=False)),
        sp_model=SimpleNamespace(projections=[SimpleNamespace(linear=linear)]),
        model=torch.nn.Module(),
    )
    x = torch.ones(1000, 64, dtype=dtype)
    with noisy_linears(runner, 1):
        out = linear(x)[0].float()
    spread = torch.finfo(dtype).eps / 2 * terms**0.5
    assert out.std() == pytest.approx(spread, rel=0.5)
    assert torch.equal(linear(x)[0], x), "the hooks are gone"
