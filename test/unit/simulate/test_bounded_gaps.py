"""The simulator with a bound on the gap between tokens, and what it says of the gaps."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from sglang_shift.cost.chunk_budget import ChunkBudget
from sglang_shift.cost.model import CostModel, Curve
from sglang_shift.modes import Mode
from sglang_shift.policy.builtin import Calibrated, FixedMode
from sglang_shift.simulate.simulator import Server, simulate
from sglang_shift.simulate.traffic import Request, steady

PHASES = ("prefill", "decode")


def line(start: float, slope: float) -> Curve:
    return Curve((1, 100_001), (start + slope, start + slope * 100_001))


COSTS = CostModel(
    {
        "prefill": {Mode.TP: line(0.010, 50e-6), Mode.SP: line(0.020, 25e-6)},
        "decode": {Mode.TP: line(0.005, 20e-6), Mode.SP: line(0.010, 20e-6)},
    },
    dict.fromkeys(PHASES, Curve((1,), (1.0,))),
    {"prefill": 1e-9, "decode": 2e-8},
    0.0,
)


def run(requests, server, policy=None):
    steps = []
    result = simulate(requests, policy or Calibrated(COSTS, server.chunk), COSTS, server, lambda *s: steps.append(s))
    return result, steps


def test_gaps_by_hand():
    # The first prompt ends at 0.015, and the second at 0.035, while the first request waits. Both decode until 0.0452.
    requests = [Request(0.0, 100, 2), Request(0.001, 200, 3)]
    flat = CostModel(COSTS.curves, COSTS.usual, dict.fromkeys(PHASES, 0.0), 0.0)
    result = simulate(requests, FixedMode(Mode.TP), flat)
    both, alone = 0.005 + 2 * 20e-6, 0.005 + 20e-6
    assert sorted(result.gaps) == [
        (pytest.approx(alone), 1),
        (pytest.approx(both), 1),
        (pytest.approx(0.020 + both), 1),
    ]
    metrics = result.metrics()
    assert metrics["max_gap"] == metrics["p99_gap"] == pytest.approx(0.020 + both)
    assert metrics["mean_gap"] == pytest.approx((2 * both + alone + 0.020) / 3)
    assert metrics["p99_ttft"] == pytest.approx(0.034)


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_every_gap_is_within_the_bound_unless_the_floor_rules(mixed, seed):
    rng = random.Random(seed)
    requests = steady(rng.uniform(1, 6), prompt=(100, 20_000), output=(1, 60), requests=60, seed=seed)
    target = rng.uniform(0.1, 0.4)
    budget = ChunkBudget(COSTS, target, floor=rng.choice([1, 512]))
    result, steps = run(requests, Server(8192, mixed=mixed, max_running=100, budget=budget))
    assert sum(n for _, n in result.gaps) == sum(r.output - 1 for r in requests)
    assert sum(result.tokens.values()) == sum(r.prompt + r.output - 1 for r in requests)
    if budget.floor == 1:
        # A prompt that ends joins the decode step that follows. The budget does not know that.
        assert result.metrics()["max_gap"] <= target * (1 + 1e-9 if mixed else 1.01)
    bounded = [s for s, _, _ in steps if s.num_running and s.num_prefill_tokens]
    assert bounded
    assert all(s.num_tokens == s.num_prefill_tokens + mixed * s.num_running for s in bounded)
    assert all(
        s.num_prefill_tokens >= min(budget.floor, s.num_prefill_tokens + s.pending_prefill_tokens) for s in bounded
    )
    if not mixed:
        kinds = [(s.num_prefill_tokens > 0 and s.num_running > 0, s.num_prefill_tokens > 0) for s, _, _ in steps]
        assert not any(a[0] and b[1] for a, b in pairwise(kinds)), "a decode follows each chunk"


def test_the_bound_holds_for_one_mode_as_well():
    requests = steady(3, prompt=(100, 20_000), output=(1, 60), requests=60)
    budget = ChunkBudget(COSTS, 0.3, floor=1, modes=(Mode.TP,))
    result, _ = run(requests, Server(8192, mixed=True, max_running=100, budget=budget), FixedMode(Mode.TP))
    assert result.metrics()["max_gap"] <= 0.3 * (1 + 1e-9)
    assert result.steps[Mode.SP] == 0


def test_without_a_bound_a_long_prompt_stops_all_decodes():
    requests = [Request(0.0, 100, 200), Request(0.1, 50_000, 2), Request(0.1, 50_000, 2)]
    plain, _ = run(requests, Server(8192))
    bounded, _ = run(requests, Server(8192, mixed=True, max_running=100, budget=ChunkBudget(COSTS, 0.2)))
    assert plain.metrics()["max_gap"] > 2.0
    assert bounded.metrics()["max_gap"] <= 0.2 * (1 + 1e-9)


def test_no_running_request_leaves_the_chunk_to_sglang():
    budget = ChunkBudget(COSTS, 0.001)
    _, steps = run([Request(0.0, 30_000, 1)], Server(8192, budget=budget))
    assert [s.num_tokens for s, _, _ in steps] == [8192, 8192, 8192, 30_000 - 3 * 8192]


def test_a_short_prompt_passes_a_long_one_and_the_long_one_progresses():
    long = [Request(0.0, 60_000, 2) for _ in range(2)]
    short = [Request(0.5 + 0.1 * i, 200, 2) for i in range(20)]
    bounded, steps = run(long + short, Server(4096, budget=ChunkBudget(COSTS, 0.2), max_running=100))
    assert max(s.ttft for s in bounded.served if s.request.prompt == 200) < 1.0
    plain, _ = run(long + short, Server(4096))
    assert max(s.ttft for s in plain.served if s.request.prompt == 200) > 2.0
    waiting = [s.num_waiting for s, _, _ in steps]
    assert max(waiting) <= 4 and waiting[-1] == 0
    last = max(s.request.time + s.e2e for s in bounded.served)
    assert last < 1.5 * max(s.request.time + s.e2e for s in plain.served)


def test_the_interval_without_a_bound():
    requests = [Request(0.0, 100, 50), Request(0.01, 50_000, 2)]
    _, steps = run(requests, Server(8192, interval=2))
    phases = "".join("p" if s.num_prefill_tokens else "d" for s, _, _ in steps)
    assert phases.startswith("pddpddpddpddpdd"), phases
