"""The number of prompt tokens that fit a target, against counting up, one token after the other."""

from __future__ import annotations

import random

import calibrations
import pytest
from sglang_shift.cost.chunk_budget import FLOOR, ChunkBudget, Decodes, Prompts
from sglang_shift.cost.model import CostModel, Curve, fit, isotonic
from sglang_shift.modes import Mode, StepState


def made_up(rng: random.Random) -> CostModel:
    """Costs whose times rise with the tokens: attention beyond the usual costs less than the curves say."""
    tokens = sorted(rng.sample(range(2, 3000), 6))

    def curve(start: float, slope: float) -> Curve:
        values = [start + slope * n * rng.uniform(0.8, 1.2) for n in tokens]
        return Curve(tuple(tokens), tuple(isotonic(values)))

    return CostModel(
        {phase: {mode: curve(rng.uniform(1, 20), rng.uniform(0.01, 0.1)) for mode in Mode} for phase in PHASES},
        dict.fromkeys(PHASES, Curve((1,), (1.0,))),
        {"prefill": rng.uniform(0, 1e-5), "decode": rng.uniform(0, 1e-4)},
        0.0,
    )


PHASES = ("prefill", "decode")


def seconds(costs: CostModel, prompts: list[tuple[int, int]], decodes: Decodes, modes=tuple(Mode)) -> float:
    """The time until each decoding request has its next token, if prompts of (history, tokens) run now."""
    tokens = sum(n for _, n in prompts)
    reads = sum(history + i for history, n in prompts for i in range(1, n + 1))
    decode = StepState(decodes.requests * decodes.width, kv_reads=decodes.kv_reads, width=decodes.width)
    if not decodes.mixed:
        chunk = StepState(tokens, tokens, kv_reads=reads)
        return min(costs.predict(m, chunk) for m in modes) + min(costs.predict(m, decode) for m in modes)
    total = tokens + decodes.requests
    return min(
        costs.curves["prefill"][m](total)
        + costs.attention["prefill"] * max(0.0, reads - costs.usual["prefill"](total))
        + costs.attention["decode"] * decodes.kv_reads
        for m in modes
    )


@pytest.mark.parametrize("seed", range(30))
def test_against_counting_up(seed):
    rng = random.Random(seed)
    costs = made_up(rng)
    mixed = rng.random() < 0.5
    decodes = Decodes(rng.randint(1, 60), rng.randint(1, 10**5), 1 if mixed else rng.randint(1, 4), mixed)
    modes = rng.choice([tuple(Mode), (Mode.TP,), (Mode.SP,)])
    target, margin = rng.uniform(5, 200), rng.uniform(0.5, 1.0)
    budget = ChunkBudget(costs, target, margin, floor=rng.randint(1, 100), modes=modes)
    before = [(rng.randint(0, 500), rng.randint(1, 50)) for _ in range(rng.randint(0, 2))]
    history, most = rng.randint(0, 20_000), rng.randint(1, 1500)
    prompts = Prompts()
    for part in before:
        prompts = prompts.plus(*part)
    fitting = 0
    while fitting < most and seconds(costs, [*before, (history, fitting + 1)], decodes, modes) <= target * margin:
        fitting += 1
    assert budget.fitting_tokens(prompts, history, most, decodes) == fitting
    expected = max(fitting, min(most, budget.floor - prompts.tokens))
    assert budget.room(prompts, history, most, decodes) == expected


@pytest.mark.parametrize("server", calibrations.SERVERS)
def test_with_a_fitted_model_the_chunk_fits_and_one_more_does_not(server):
    costs = fit(calibrations.measurements(server, sigma=0.03, seed=1))
    rng = random.Random(2)
    for _ in range(100):
        mixed = rng.random() < 0.5
        decodes = Decodes(rng.randint(1, 200), rng.randint(1, 10**6), mixed=mixed)
        target, history = rng.uniform(0.01, 0.5), rng.randint(0, 60_000)
        budget = ChunkBudget(costs, target)
        tokens = budget.fitting_tokens(Prompts(), history, 8192, decodes)
        if tokens:
            assert seconds(costs, [(history, tokens)], decodes) <= target * (1 + 1e-9)
        if tokens < 8192:
            assert seconds(costs, [(history, tokens + 1)], decodes) > target * (1 - 1e-9)


def line(start: float, slope: float) -> Curve:
    return Curve((1, 10_001), (start + slope, start + slope * 10_001))


COSTS = CostModel(
    {
        "prefill": {Mode.TP: line(1.0, 0.01), Mode.SP: line(5.0, 0.005)},
        "decode": {Mode.TP: line(0.5, 0.1), Mode.SP: line(2.0, 0.1)},
    },
    dict.fromkeys(PHASES, Curve((1,), (1.0,))),
    {"prefill": 0.0, "decode": 0.001},
    0.0,
)


def test_by_hand():
    # 10 decodes take 1.5 s and 0.1 s of attention. A chunk of n tokens takes the less of 1 + n/100 and 5 + n/200.
    decodes = Decodes(10, 101)
    budget = ChunkBudget(COSTS, 5.605, floor=1)
    assert budget.decode_seconds(decodes) == pytest.approx(1.6)
    assert budget.room(Prompts(), 0, 8192, Decodes(10, 101)) == 300
    # In a mixed step, 10 of the tokens are decodes, and their attention takes 0.101 s.
    assert budget.room(Prompts(), 0, 8192, Decodes(10, 101, mixed=True)) == 450 - 10
    assert ChunkBudget(COSTS, 5.605, modes=(Mode.SP,), floor=1).room(
        Prompts(), 0, 8192, Decodes(10, 101, mixed=True)
    ) == (int((5.605 - 5.0 - 0.101) / 0.005) - 10)


def test_without_decodes_the_chunk_is_sglangs():
    budget = ChunkBudget(COSTS, 1e-6)
    assert budget.room(Prompts(), 10**6, 8192, Decodes()) == 8192
    assert budget.room(Prompts(100, 100), 0, 77, Decodes(0, 0, mixed=True)) == 77


def test_the_floor_counts_all_prompts_of_the_step():
    budget, decodes = ChunkBudget(COSTS, 1e-6), Decodes(1, 1)
    assert budget.room(Prompts(), 0, 8192, decodes) == FLOOR
    assert budget.room(Prompts(FLOOR - 12, 0), 0, 8192, decodes) == 12
    assert budget.room(Prompts(FLOOR, 0), 0, 8192, decodes) == 0
    assert budget.room(Prompts(), 0, 100, decodes) == 100  # a smaller chunk than the floor


def test_the_margin_shortens_the_target():
    decodes = Decodes(10, 100, mixed=True)
    assert ChunkBudget(COSTS, 8.0, margin=0.5, floor=1).room(Prompts(), 0, 8192, decodes) == (
        ChunkBudget(COSTS, 4.0, floor=1).room(Prompts(), 0, 8192, decodes)
    )


def test_padding_counts():
    padded = ChunkBudget(COSTS, 3.0, floor=1, padding=lambda prompts, n: {Mode.TP: -(-n // 64) * 64, Mode.SP: n})
    assert padded.room(Prompts(), 0, 8192, Decodes(10, 0, mixed=True)) == 192 - 10


def test_a_mixed_step_counts_decodes_at_their_own_cost():
    mixed = StepState(110, 100, kv_reads=5050 + 3000, decode_kv_reads=3000)
    alone = StepState(110, 100, kv_reads=5050)
    for mode in Mode:
        assert COSTS.predict(mode, mixed) == pytest.approx(COSTS.predict(mode, alone) + 3.0)
    assert COSTS.fastest_seconds(mixed) == min(COSTS.predict(mode, mixed) for mode in Mode)
    assert COSTS.fastest_seconds(mixed, (Mode.SP,)) == COSTS.predict(Mode.SP, mixed)
