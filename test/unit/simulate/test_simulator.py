"""The simulator, on cases that can be worked out by hand, and against a slow one that counts everything."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from sglang_shift.cost.model import CostModel, Curve
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policy.builtin import FixedMode, TokenThreshold
from sglang_shift.simulate.simulator import Server, simulate
from sglang_shift.simulate.traces import read_azure, read_mooncake, read_trace
from sglang_shift.simulate.traffic import Request, bursty, cut_window, ramp, scale, steady

TP, SP = FixedMode(Mode.TP), FixedMode(Mode.SP)


def line(start: float, slope: float) -> Curve:
    return Curve((1, 100_001), (start + slope, start + slope * 100_001))


def costs(switch_seconds: float = 0.0, attention: float = 0.0) -> CostModel:
    """Prefill: 1 s and 10 ms a token in TP, 2 s in SP. Decode: 0.5 s and 10 ms a token in TP, 1 s in SP."""
    flat = Curve((1,), (0.0,))
    return CostModel(
        {
            "prefill": {Mode.TP: line(1.0, 0.01), Mode.SP: line(2.0, 0.0)},
            "decode": {Mode.TP: line(0.5, 0.01), Mode.SP: line(1.0, 0.0)},
        },
        {"prefill": flat, "decode": flat},
        {"prefill": attention, "decode": attention},
        switch_seconds,
    )


def watch(requests, policy=TP, true_costs=None, server=None):
    """The result, and each step as (state, mode, seconds)."""
    steps: list[tuple[StepState, Mode, float]] = []
    result = simulate(requests, policy, true_costs or costs(), server, lambda *step: steps.append(step))
    return result, steps


def shapes(steps):
    return [(s.num_tokens, s.num_prefill_tokens) for s, _, _ in steps]


def test_one_request():
    result, steps = watch([Request(5.0, 10, 3)])
    [served] = result.served
    assert served.ttft == pytest.approx(1.1)
    assert served.tpot == pytest.approx(0.51)
    assert served.e2e == pytest.approx(1.1 + 2 * 0.51)
    assert (result.makespan, result.step_seconds) == (pytest.approx(2.12), pytest.approx(2.12))
    assert result.throughput == pytest.approx(13 / 2.12)
    assert result.steps == {Mode.TP: 3, Mode.SP: 0}
    assert result.tokens == {Mode.TP: 12, Mode.SP: 0}
    assert [s for s, _, _ in steps] == [
        StepState(10, 10, 0, 0, 0, {}, 55, None, 0),
        StepState(1, 0, 1, 0, 0, {}, 11, Mode.TP, 1),
        StepState(1, 0, 1, 0, 0, {}, 12, Mode.TP, 2),
    ]


def test_one_token_has_no_tpot():
    result, steps = watch([Request(0, 10, 1)])
    assert result.served[0].tpot is None
    assert result.served[0].ttft == result.served[0].e2e == pytest.approx(1.1)
    assert result.metrics()["mean_tpot"] == 0.0
    assert len(steps) == 1


def test_two_requests_prompts_first():
    # 0.0 prefill of A; 1.1 of B; 2.3 decode of both, B ends; 2.82 of A; 3.33.
    result, steps = watch([Request(0.5, 20, 2), Request(0.0, 10, 3)])
    a, b = result.served
    assert [a.request.prompt, b.request.prompt] == [10, 20]
    assert (a.ttft, a.tpot, a.e2e) == (pytest.approx(1.1), pytest.approx((3.33 - 1.1) / 2), pytest.approx(3.33))
    assert (b.ttft, b.tpot, b.e2e) == (pytest.approx(1.8), pytest.approx(0.52), pytest.approx(2.32))
    assert shapes(steps) == [(10, 10), (20, 20), (2, 0), (1, 0)]
    assert [s.kv_reads for s, _, _ in steps] == [55, 210, 11 + 21, 12]
    assert [s.num_running for s, _, _ in steps] == [0, 1, 2, 1]


def test_metrics_are_means_and_the_99th_percentile():
    result, _ = watch([Request(1000.0 * i, 10 + i, 2) for i in range(100)])
    metrics = result.metrics()
    assert metrics["mean_ttft"] == pytest.approx(1.1 + 0.01 * 49.5)
    assert metrics["mean_tpot"] == pytest.approx(0.51)
    assert metrics["mean_e2e"] == pytest.approx(1.61 + 0.01 * 49.5)
    assert metrics["p99_e2e"] == pytest.approx(1.61 + 0.01 * 98)
    assert metrics["makespan"] == pytest.approx(99_000 + 1.61 + 0.99)
    assert metrics["busy"] == pytest.approx(161 + 49.5)


def test_prompts_share_a_chunk_and_long_ones_take_several():
    requests = [Request(0, 4, 1), Request(0, 25, 2), Request(0, 3, 1), Request(0, 5, 1)]
    result, steps = watch(requests, server=Server(chunk=10))
    assert shapes(steps) == [(10, 10), (10, 10), (10, 10), (7, 7), (1, 0)]
    # 4 and 6 of 25; 10 of 25; the last 9 and 1 of 3; 2 of 3 and 5.
    assert [s.kv_reads for s, _, _ in steps] == [10 + 21, 10 * 6 + 55, 9 * 16 + 45 + 1, 2 * 1 + 3 + 15, 26]
    assert [s.pending_prefill_tokens for s, _, _ in steps] == [19 + 8, 9 + 8, 2 + 5, 0, 0]
    assert [s.num_waiting for s, _, _ in steps] == [2, 2, 1, 0, 0]
    ends = [1.1, 2.2, 3.3, 4.37]
    assert [s.ttft for s in result.served] == [pytest.approx(ends[i]) for i in (0, 2, 3, 3)]


def test_the_pool_limits_who_is_admitted():
    requests = [Request(0, 10, 3), Request(0, 10, 4), Request(0, 10, 1)]
    result, steps = watch(requests, server=Server(pool=27))
    # The third needs 11 tokens and finds 0 free, then, once the first has ended, 13.
    assert shapes(steps) == [(20, 20), (2, 0), (2, 0), (10, 10), (1, 0)]
    assert [(s.num_waiting, s.pending_prefill_tokens) for s, _, _ in steps] == [
        (1, 10),
        (1, 10),
        (1, 10),
        (0, 0),
        (0, 0),
    ]
    assert result.served[2].ttft == pytest.approx(1.2 + 2 * 0.52 + 1.1)


def test_running_requests_are_limited():
    _, steps = watch([Request(0, 10, 2)] * 3, server=Server(max_running=2))
    assert shapes(steps) == [(20, 20), (2, 0), (10, 10), (1, 0)]


def test_mixed_steps_decode_too():
    requests = [Request(0, 10, 5), Request(0.5, 30, 2)]
    _, steps = watch(requests, server=Server(chunk=16, max_running=4, mixed=True))
    assert shapes(steps) == [(10, 10), (16, 15), (16, 15), (2, 0), (1, 0)]
    assert [s.kv_reads for s, _, _ in steps] == [55, 120 + 11, 15 * 15 + 120 + 12, 13 + 31, 14]
    assert [s.phase for s, _, _ in steps] == ["prefill", "mixed", "mixed", "decode", "decode"]


def test_decode_steps_have_the_bucket_of_their_graph():
    _, steps = watch([Request(0, 10, 2)] * 5 + [Request(100, 10, 2)] * 3, server=Server(buckets={Mode.TP: (1, 2, 4)}))
    assert [(s.num_tokens, s.padded[Mode.TP]) for s, _, _ in steps] == [(50, 50), (5, 5), (30, 30), (3, 4)]
    assert steps[3][2] == pytest.approx(0.54)  # of the bucket


def test_pending_tokens_count_the_first_64_who_wait():
    requests = [Request(0, 100, 1)] + [Request(0, i, 1) for i in range(1, 101)]
    _, steps = watch(requests, server=Server(chunk=100))
    assert steps[0][0].num_waiting == 100
    assert steps[0][0].pending_prefill_tokens == sum(range(1, 65))


def test_the_clock_jumps_over_idle_times_and_remembers_the_mode():
    result, steps = watch([Request(0, 10, 1), Request(1000, 10, 1)])
    assert result.makespan == pytest.approx(1001.1)
    assert result.step_seconds == pytest.approx(2.2)
    assert steps[1][0].previous_mode is Mode.TP


def test_a_switch_costs_its_time():
    policy = TokenThreshold(5)  # prefills in SP, decodes in TP
    result, steps = watch([Request(0, 10, 3), Request(50, 10, 2)], policy, costs(switch_seconds=0.25))
    assert [seconds for _, _, seconds in steps] == pytest.approx([2.0, 0.76, 0.51, 2.25, 0.76])
    assert [s.steps_since_switch for s, _, _ in steps] == [0, 1, 0, 1, 0]
    assert [s.previous_mode for s, _, _ in steps] == [None, Mode.SP, Mode.TP, Mode.TP, Mode.SP]
    assert result.switches == 3
    assert result.steps == {Mode.TP: 3, Mode.SP: 2}
    assert result.tokens == {Mode.TP: 3, Mode.SP: 20}


def test_nothing_to_serve_and_what_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="no requests"):
        simulate([], TP, costs())
    with pytest.raises(ValueError, match=r"more tokens than the KV pool holds \(20\)"):
        simulate([Request(0, 10, 11)], TP, costs(), Server(pool=20))
    with pytest.raises(ValueError, match="chunk"):
        Server(chunk=0)
    with pytest.raises(ValueError, match="mixed"):
        Server(chunk=8, max_running=8, mixed=True)
    with pytest.raises(ValueError, match="a token of prompt"):
        Request(0, 0, 1)


class Slow:
    """The same scheduler, written down request by request."""

    def __init__(self, requests, policy, true_costs, server):
        self.waiting = sorted(requests, key=lambda r: r.time)
        self.order = list(self.waiting)
        self.policy, self.true_costs, self.server = policy, true_costs, server
        self.prefilled: dict[int, int] = {}
        self.generated: dict[int, int] = {}
        self.first: dict[int, float] = {}
        self.end: dict[int, float] = {}
        self.states: list[StepState] = []
        self.clock, self.mode, self.since = 0.0, None, 0

    def run(self):
        requests, server = self.order, self.server
        while len(self.end) < len(requests):
            admitted = [i for i in self.prefilled if i not in self.end]
            queue = [i for i, r in enumerate(requests) if r.time <= self.clock and i not in self.prefilled]
            if not admitted and not queue:
                self.clock = min(r.time for i, r in enumerate(requests) if i not in self.prefilled)
                continue
            running = [i for i in admitted if i in self.generated]
            parts = self.prefill(admitted, running, queue)
            decoding = running if server.mixed or not parts else []
            tokens = sum(parts.values())
            reads = sum(sum(self.prefilled[i] + k for k in range(1, n + 1)) for i, n in parts.items())
            decode_reads = sum(requests[i].prompt + self.generated[i] for i in decoding)
            reads += decode_reads
            rest = sum(requests[i].prompt - self.prefilled[i] - n for i, n in parts.items())
            waits = [i for i in queue if i not in parts]
            total = tokens + len(decoding)
            state = StepState(
                num_tokens=total,
                num_prefill_tokens=tokens,
                num_running=len(running),
                num_waiting=len(waits),
                pending_prefill_tokens=rest + sum(requests[i].prompt for i in waits[:64]),
                padded={
                    mode: next((b for b in sizes if b >= total and not tokens), total)
                    for mode, sizes in server.buckets.items()
                },
                kv_reads=reads,
                previous_mode=self.mode,
                steps_since_switch=self.since,
                decode_kv_reads=decode_reads if parts else 0,
            )
            self.step(state, parts, decoding)
        return self

    def prefill(self, admitted, running, queue):
        """How many tokens of which prompts the next step computes."""
        room = self.server.chunk - (len(running) if self.server.mixed else 0)
        free = self.server.pool - sum(self.order[i].prompt + self.order[i].output for i in admitted)
        parts: dict[int, int] = {}
        for i in [i for i in admitted if i not in self.generated] + queue:
            r, new = self.order[i], i in queue
            if room == 0 or (new and len(admitted) >= self.server.max_running) or (new and r.prompt + r.output > free):
                break
            if new:
                admitted = [*admitted, i]
                free -= r.prompt + r.output
                self.prefilled[i] = 0
            parts[i] = min(room, r.prompt - self.prefilled[i])
            room -= parts[i]
        return parts

    def step(self, state, parts, decoding):
        self.states.append(state)
        mode = self.policy.choose(state)
        switched = self.mode not in (None, mode)
        self.clock += self.true_costs.predict(mode, state) + switched * self.true_costs.switch_seconds
        self.since = 0 if switched else self.since + 1
        self.mode = mode
        for i in decoding:
            self.generated[i] += 1
        for i, n in parts.items():
            self.prefilled[i] += n
            if self.prefilled[i] == self.order[i].prompt:
                self.generated[i] = 1
                self.first[i] = self.clock
        for i, n in self.generated.items():
            if n == self.order[i].output and i not in self.end:
                self.end[i] = self.clock


@pytest.mark.parametrize("seed", range(40))
def test_against_a_simulator_that_counts_everything(seed):
    rng = random.Random(seed)
    mixed = rng.random() < 0.3
    most = rng.randint(1, 12)
    server = Server(
        chunk=rng.randint(most + 1, 60),
        pool=rng.randint(150, 400),
        max_running=most,
        mixed=mixed,
        buckets=rng.choice([{}, {Mode.TP: (1, 2, 4, 8)}]),
    )
    requests = [
        Request(rng.choice([0.0, rng.uniform(0, 200)]), rng.randint(1, 120), rng.randint(1, 30))
        for _ in range(rng.randint(1, 60))
    ]
    policy, true_costs = TokenThreshold(rng.randint(0, 40)), costs(rng.choice([0.0, 0.3]), 1e-4)
    result, steps = watch(requests, policy, true_costs, server)
    slow = Slow(requests, policy, true_costs, server).run()
    assert [s for s, _, _ in steps] == slow.states
    for i, served in enumerate(result.served):
        assert served.request == slow.order[i]
        assert served.ttft == pytest.approx(slow.first[i] - served.request.time)
        assert served.e2e == pytest.approx(slow.end[i] - served.request.time)
    assert sum(result.tokens.values()) == sum(r.prompt + r.output - 1 for r in requests)
    assert sum(result.steps.values()) == len(steps)
    assert result == simulate(requests, policy, true_costs, server)


def test_the_policy_decides_and_the_truth_takes_its_time():
    class Liar(ShiftPolicy):
        def choose(self, step):
            return Mode.SP if step.num_waiting else Mode.TP

    result, steps = watch([Request(0, 10, 1), Request(0, 10, 1)], Liar(), server=Server(chunk=10))
    assert [mode for _, mode, _ in steps] == [Mode.SP, Mode.TP]
    assert [s.ttft for s in result.served] == [pytest.approx(2.0), pytest.approx(3.1)]


class TestTraffic:
    def test_the_same_seed_makes_the_same_requests(self):
        for make in (
            lambda seed: steady(2.0, prompt=(1, 50), output=(1, 5), requests=50, seed=seed),
            lambda seed: ramp(0.0, 2.0, prompt=(1, 50), output=(1, 5), requests=50, seed=seed),
            lambda seed: bursty(1.0, prompt=9, output=2, seconds=50, burst=5, every=10, burst_seconds=2, seed=seed),
        ):
            assert make(3) == make(3) != make(4)
            assert all(a.time <= b.time for a, b in pairwise(make(3)))

    def test_steady_has_its_rate_and_lengths(self):
        requests = steady(4.0, prompt=(8, 512), output=7, requests=4000, seed=1)
        assert len(requests) == 4000
        assert requests[-1].time == pytest.approx(1000, rel=0.05)
        assert {r.output for r in requests} == {7}
        assert min(r.prompt for r in requests) == 8
        assert 500 < max(r.prompt for r in requests) <= 512
        assert sorted(r.prompt for r in requests)[2000] == pytest.approx(64, rel=0.1)  # of the logarithm

    @pytest.mark.parametrize(("first", "last"), [(1.0, 3.0), (3.0, 1.0), (0.0, 4.0), (2.0, 2.0)])
    def test_a_ramp_changes_its_rate_linearly(self, first, last):
        requests = ramp(first, last, prompt=1, output=1, requests=8000, seed=2)
        half = sum(r.time < 2000 for r in requests)  # of the 4000 s that it takes on average
        assert half == pytest.approx(2000 * (first + (first + last) / 2) / 2, rel=0.06)
        assert requests[-1].time == pytest.approx(4000, rel=0.06)

    def test_bursts_come_on_top_of_a_stream(self):
        requests = bursty(0.5, prompt=1, output=1, seconds=1000, burst=50, every=100, seed=5)
        times = [r.time for r in requests]
        assert [times.count(t) for t in range(50, 1000, 100)] == [50] * 10
        assert len(requests) - 500 == pytest.approx(500, rel=0.15)
        spread = bursty(0.5, prompt=1, output=1, seconds=1000, burst=50, every=100, burst_seconds=10, seed=5)
        assert sum(50 <= r.time < 60 for r in spread) >= 50

    def test_azure(self, tmp_path):
        file = tmp_path / "trace.csv"
        file.write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:04.5000000,3180,8\n"
            "2023-11-16 18:17:03.9799600,4808,10\n"
            "2023-11-16 18:17:05,110,0\n"
            "2023-11-16 19:17:03.9799600,110,27\n"
        )
        requests = read_azure(file)
        assert [(r.prompt, r.output) for r in requests] == [(4808, 10), (3180, 8), (110, 27)]
        assert [r.time for r in requests] == pytest.approx([0.0, 0.52004, 3600.0], abs=1e-5)
        assert read_trace(file) == requests

    def test_mooncake(self, tmp_path):
        file = tmp_path / "trace.jsonl"
        file.write_text(
            '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
            '{"timestamp": 4500, "input_length": 7322, "output_length": 490, "hash_ids": []}\n\n'
        )
        assert read_mooncake(file) == [Request(0.0, 6758, 500, (0, 1), 512.0), Request(1.5, 7322, 490)]
        assert read_trace(file) == read_mooncake(file)

    def test_a_window_starts_its_own_clock(self):
        requests = [Request(t, 1, 1) for t in (0, 10, 15, 19.5, 20)]
        assert cut_window(requests, 10, 10) == [Request(t, 1, 1) for t in (0, 5, 9.5)]

    def test_scaling_and_clamping(self):
        requests = [Request(10, 1000, 100), Request(20, 3, 1)]
        assert scale(requests) == requests
        assert scale(requests, time=0.5, length=0.1) == [Request(5, 100, 10), Request(10, 1, 1)]
        assert scale(requests, context=512) == [Request(10, 412, 100), Request(20, 3, 1)]
        assert scale(requests, context=100) == [Request(10, 50, 50), Request(20, 3, 1)]
        with pytest.raises(ValueError, match="context"):
            scale(requests, context=1)
