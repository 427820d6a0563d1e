"""The mode selector's bookkeeping, and what it does with a policy that fails."""

from __future__ import annotations

import random

import pytest
from harness import run_ranks
from sglang_shift.config import ShiftConfig
from sglang_shift.cost.model import CostModel, Curve, Measurement, fit
from sglang_shift.modes import Mode, ShiftPolicy, StepState
from sglang_shift.policy.builtin import Calibrated, FixedMode, QueueDepth, RankZeroPolicy, TokenThreshold
from sglang_shift.policy.probes import MAX_SLOWDOWN, PROBE_INTERVAL, TIME_SHARE
from sglang_shift.policy.selector import DRIFT, DRIFT_STEPS, MIN_STEPS, Drift, ModeSelector, make_policy

COSTS = fit([Measurement(phase, mode, 1, 1, 0.1) for phase in ("prefill", "decode") for mode in Mode])


class Recorder(ShiftPolicy):
    """Alternates, and keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[StepState] = []

    def choose(self, step):
        self.seen.append(step)
        return Mode.SP if len(self.seen) % 3 == 0 else Mode.TP


def test_the_policy_sees_the_past():
    selector = ModeSelector(Recorder())
    choices = [selector.choose(StepState(num_tokens=n)) for n in (1, 2, 4, 8, 16)]
    seen = selector.policy.seen
    assert [s.previous_mode for s in seen] == [None, "tp", "tp", "sp", "tp"]
    assert [s.steps_since_switch for s in seen] == [0, 1, 2, 0, 0]
    assert [c.switched for c in choices] == [False, False, True, True, False]
    assert selector.steps == {Mode.TP: 4, Mode.SP: 1}
    assert selector.tokens == {Mode.TP: 27, Mode.SP: 4}
    assert selector.switches == 2


def test_a_step_that_needs_tp_runs_in_tp_and_the_policy_does_not_see_it():
    selector = ModeSelector(Recorder())
    steps = [StepState(num_tokens=1), *[StepState(num_tokens=2, needs_tp="an adapter")] * 2, StepState(num_tokens=4)]
    choices = [selector.choose(step) for step in [*steps, StepState(num_tokens=8), *steps[1:2]]]
    assert [c.mode for c in choices] == ["tp", "tp", "tp", "tp", "sp", "tp"]
    assert [s.num_tokens for s in selector.policy.seen] == [1, 4, 8]
    assert [s.previous_mode for s in selector.policy.seen] == [None, "tp", "tp"]
    assert [c.switched for c in choices] == [False, False, False, False, True, False]
    assert not any(c.probe for c in choices)
    assert selector.previous_mode is Mode.SP, "the policy's choice, not the step that had to run in TP"
    assert selector.steps == {Mode.TP: 5, Mode.SP: 1}
    assert selector.switches == 1


@pytest.mark.parametrize("policy", [FixedMode(Mode.SP), TokenThreshold(0)])
def test_a_step_that_needs_tp_runs_in_tp_whatever_the_policy_is(policy):
    selector = ModeSelector(policy)
    assert selector.choose(StepState(num_tokens=9)).mode is Mode.SP
    assert selector.choose(StepState(num_tokens=9, needs_tp="an adapter")).mode is Mode.TP


class Failing(ShiftPolicy):
    def choose(self, step):
        if step.num_tokens > 5:
            raise ZeroDivisionError
        return Mode.SP


class Nonsense(ShiftPolicy):
    def choose(self, step):
        return "fast"


@pytest.mark.parametrize("policy", [Failing(), Nonsense()])
def test_a_policy_that_fails_is_replaced(policy, caplog):
    selector = ModeSelector(RankZeroPolicy(policy, True, lambda answer: answer))
    selector.choose(StepState(num_tokens=1))
    assert selector.choose(StepState(num_tokens=1000)).mode is Mode.SP
    assert isinstance(selector.policy, TokenThreshold)
    assert type(policy).__name__ in caplog.text
    assert sum(selector.steps.values()) == 2, "no step counted twice"


def test_a_policy_of_the_package_that_fails_ends_the_rank():
    """It could have failed on this rank only, and the others would not know: no rank may go on alone."""
    selector = ModeSelector(Failing())
    with pytest.raises(ZeroDivisionError):
        selector.choose(StepState(num_tokens=1000))


class Mute(Failing):
    def explain(self, step, mode):
        raise KeyError("no reason")

    def describe(self):
        raise KeyError("no line")


def test_explaining_is_not_choosing():
    """Nobody but the reporter asks for a reason; a line that cannot be had does not stop a server."""
    policy = RankZeroPolicy(Mute(), True, lambda answer: answer)
    selector = ModeSelector(policy)
    assert selector.policy_text == "Mute (it does not describe itself: KeyError: 'no line')"
    selector.policy = FixedMode(Mode.TP)
    selector.choose(StepState(num_tokens=1))
    selector.policy = policy
    choice = selector.choose(StepState(num_tokens=1))
    assert choice.switched and choice.mode is Mode.SP and selector.policy is policy


class Own(ShiftPolicy):
    """Everything that a policy of the user's should not do: it rolls dice, and fails on some ranks."""

    def __init__(self, rank: int, fails_on: range) -> None:
        self.rank, self.fails_on, self.dice = rank, fails_on, random.Random(rank)

    def choose(self, step):
        if self.rank in self.fails_on and step.num_tokens == 50:
            raise OSError("only here")
        return self.dice.choice(list(Mode))


def choose_together(rank, size, fails_on, replaced):
    import torch
    import torch.distributed as dist

    def share(answer):
        shared = torch.tensor([answer])
        dist.broadcast(shared, 0)
        return int(shared)

    selector = ModeSelector(RankZeroPolicy(Own(rank, fails_on), rank == 0, share))
    modes = [selector.choose(StepState(num_tokens=n)).mode for n in range(100)]
    everyone = [None] * size
    dist.all_gather_object(everyone, modes)
    assert all(other == modes for other in everyone)
    assert set(modes[:50]) == set(Mode)
    assert isinstance(selector.policy, TokenThreshold) == replaced
    if replaced:
        assert set(modes[50:]) == {Mode.TP}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("fails_on", "replaced"),
    [(range(0), False), (range(1, 2), False), (range(1), True), (range(9), True)],
    ids=["dice", "fails-on-rank-1", "fails-on-rank-0", "fails-everywhere"],
)
def test_ranks_choose_alike_whatever_the_policy_does(size, fails_on, replaced):
    run_ranks(size, choose_together, fails_on, replaced)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"policy": "tp"}, FixedMode(Mode.TP)),
        ({"policy": "sp"}, FixedMode(Mode.SP)),
        ({"policy": "tokens", "threshold": 9}, TokenThreshold(9)),
        ({"policy": "queue-depth", "threshold": 9, "enter_tokens": 99}, QueueDepth(threshold=9, enter_tokens=99)),
        ({"policy": "calibrated"}, Calibrated(COSTS, 512)),
    ],
)
def test_policies_by_name(fields, expected):
    assert make_policy(ShiftConfig(2, 2, True, **fields), COSTS, 512) == expected


def test_calibrated_without_a_calibration_goes_by_the_queue():
    assert make_policy(ShiftConfig(2, 2, True, "calibrated"), None, 512) == QueueDepth()


def test_a_policy_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(
        "from sglang_shift.modes import Mode, ShiftPolicy\n"
        "class Mine(ShiftPolicy):\n"
        "    def choose(self, step):\n"
        "        return Mode.SP if step.num_waiting else Mode.TP\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    policy = make_policy(ShiftConfig(2, 2, True, "my_policy:Mine"), None, 512)
    assert policy.choose(StepState(1, num_waiting=1)) is Mode.SP
    assert policy.describe() == "Mine"


def costs(tp: float, sp: float, switch_seconds: float = 0.0) -> CostModel:
    """Decodes of constant times; prefills of one token take as long in both modes, of 1001 ten times as long in TP."""
    flat = Curve((1,), (0.0,))
    curves = {
        "decode": {Mode.TP: Curve((1,), (tp,)), Mode.SP: Curve((1,), (sp,))},
        "prefill": {Mode.TP: Curve((1, 1001), (0.01, 0.1)), Mode.SP: Curve((1,), (0.01,))},
    }
    return CostModel(
        curves, dict.fromkeys(("prefill", "decode"), flat), {"prefill": 0.0, "decode": 0.0}, switch_seconds
    )


def decodes(selector: ModeSelector, count: int) -> list[bool]:
    return [selector.choose(StepState(num_tokens=4)).probe for _ in range(count)]


class TestProbes:
    @pytest.mark.parametrize("sp", [0.0101, 0.012, 0.0199])
    @pytest.mark.parametrize("switch", [0.0, 1e-3])
    def test_they_take_a_hundredth_of_the_time_at_most(self, sp, switch):
        model = costs(0.01, sp, switch)
        selector = ModeSelector(Calibrated(model, 512))
        spent = extra = 0.0
        for _ in range(20_000):
            choice = selector.choose(StepState(num_tokens=4))
            spent += model.predict(choice.mode, choice.step)
            extra += choice.probe * (sp - 0.01 + 2 * switch)
            assert extra <= TIME_SHARE * spent
            assert choice.mode is (Mode.SP if choice.probe else Mode.TP)
        assert MIN_STEPS < selector.steps[Mode.SP] <= 20_000 / PROBE_INTERVAL
        assert extra > 0.9 * TIME_SHARE * spent or selector.steps[Mode.SP] > 0.9 * 20_000 / PROBE_INTERVAL

    def test_close_ones_come_first(self):
        """Of decodes of 1 and of 101 tokens in turn, SP takes 99 % and 1 % longer."""
        model = costs(0.01, 0.0199)
        model.curves["decode"][Mode.TP] = Curve((1, 101), (0.01, 0.02))
        model.curves["decode"][Mode.SP] = Curve((1, 101), (0.0199, 0.0202))
        selector = ModeSelector(Calibrated(model, 512))
        choices = [selector.choose(StepState(1 + 100 * (i % 2))) for i in range(2000)]
        probes = [c.step.num_tokens for c in choices if c.probe]
        assert probes[:3] == [101, 101, 101]
        assert len(probes) > 15 and probes.count(101) > probes.count(1)

    def test_a_mode_that_runs_anyway_needs_none(self):
        selector = ModeSelector(Calibrated(costs(0.01, 0.011), 512))
        selector.policy.costs.curves["decode"][Mode.SP] = Curve((1, 5), (0.011, 0.011))
        selector.policy.costs.curves["decode"][Mode.TP] = Curve((1, 5), (0.01, 0.012))
        assert not any(selector.choose(StepState(num_tokens=1 + 4 * (i % 2))).probe for i in range(1000))

    def test_what_takes_more_than_twice_as_long_is_not_probed(self):
        selector = ModeSelector(Calibrated(costs(0.01, 1.01 * MAX_SLOWDOWN * 0.01), 512))
        assert not any(decodes(selector, 20_000))

    def test_the_policy_does_not_follow_a_probe(self):
        """Probes are no switches, and a policy that stays where it is sees what was chosen."""
        selector = ModeSelector(Calibrated(costs(0.01, 0.0101, switch_seconds=1e-4), 512))
        choices = [selector.choose(StepState(num_tokens=4)) for _ in range(1000)]
        assert sum(c.probe for c in choices) > 5
        assert not any(c.switched for c in choices) and selector.switches == 0
        assert {c.step.previous_mode for c in choices[1:]} == {Mode.TP}

    @pytest.mark.parametrize(
        "policy",
        [
            FixedMode(Mode.TP),
            FixedMode(Mode.SP),
            TokenThreshold(9),
            QueueDepth(),
            RankZeroPolicy(Recorder(), True, int),
        ],
    )
    def test_only_the_calibrated_policy_has_them(self, policy):
        selector = ModeSelector(policy)
        assert not any(decodes(selector, 1000))
        selector.policy = Calibrated(costs(0.01, 0.01), 512)
        assert any(decodes(selector, 1000))
        selector.policy = FixedMode(Mode.TP)
        assert not any(decodes(selector, 1000))

    def test_ranks_probe_alike(self):
        """From steps and predicted times alone: no clock, no dice."""
        rng = random.Random(1)
        steps = [StepState(n, rng.choice([0, n])) for n in (rng.randint(1, 100) for _ in range(3000))]
        selectors = [ModeSelector(Calibrated(costs(0.01, 0.0104), 512)) for _ in range(2)]
        chosen = [[selector.choose(step) for step in steps] for selector in selectors]
        assert chosen[0] == chosen[1]
        assert any(choice.probe for choice in chosen[0])


class TestDrift:
    def test_the_ratio_of_the_modes_is_what_decides(self):
        """TP at 1.45 and SP at 0.70 of the predicted time: neither is 1.5 off, and their ratio is 2.07 off."""
        drift = Drift()
        for _ in range(MIN_STEPS):
            drift.add(Mode.TP, 1e-3, 1.45e-3)
            assert not drift.drifted and not drift.doubts
            drift.add(Mode.SP, 1e-3, 0.70e-3)
        assert drift.drifted
        assert drift.skew("decode", Mode.TP, Mode.SP) == pytest.approx(2.07, abs=0.005)
        assert drift.doubts == {("decode", Mode.TP, Mode.SP): pytest.approx(1.07, abs=0.005)}
        assert drift.skew("prefill", Mode.TP, Mode.SP) is None
        drift.clear()
        assert not drift.drifted and not drift.doubts

    def test_what_slows_both_modes_alike_leaves_the_choice(self):
        drift = Drift()
        for _ in range(DRIFT_STEPS):
            for mode in Mode:
                drift.add(mode, 1e-3, 2e-3)
        assert drift.drifted, "predicted times are wrong"
        assert drift.doubts == {}, "and yet their ratio is right"

    def test_phases_are_not_compared_with_one_another(self):
        """Decodes in TP take 1.3 times as long as predicted, prefills in SP 0.8 times."""
        drift = Drift()
        for _ in range(DRIFT_STEPS):
            drift.add(Mode.TP, 1e-3, 1.3e-3, "decode")
            drift.add(Mode.SP, 1e-3, 0.8e-3, "mixed")
        assert not drift.drifted

    def test_one_mode_alone_is_doubted_by_little(self):
        """What made it twice as slow may well have done so to both."""
        drift = Drift()
        for _ in range(DRIFT_STEPS):
            assert drift.doubts == {}
            drift.add(Mode.TP, 1e-3, 2e-3, "prefill")
        assert drift.doubts == {("prefill", Mode.TP, Mode.SP): pytest.approx(DRIFT - 1)}

    @pytest.mark.parametrize("alone", [True, False])
    def test_what_has_become_faster_still_is(self, alone):
        """TP was predicted to be the faster mode, and is so by more than that: a deep queue must not change it."""
        drift = Drift()
        for _ in range(DRIFT_STEPS):
            drift.add(Mode.TP, 1e-2, 0.4e-2)
            if not alone:
                drift.add(Mode.SP, 1.5e-2, 1.5e-2)
        selector = ModeSelector(Calibrated(costs(0.01, 0.015), 512))
        selector.set_doubts(drift.doubts)
        assert selector.choose(StepState(num_tokens=4, num_waiting=99)).mode is Mode.TP
        selector = ModeSelector(Calibrated(costs(0.015, 0.01), 512))
        selector.set_doubts(drift.doubts)
        modes = [selector.choose(StepState(num_tokens=4, num_waiting=n)).mode for n in (99, 0)]
        assert modes == [Mode.SP, Mode.TP], "SP was to be the faster one, and may not be"

    def test_doubts_reach_the_policy_at_the_same_step_on_every_rank(self):
        selector = ModeSelector(Calibrated(costs(0.01, 0.0105), 512))
        text, asked, doubts = selector.policy_text, [], {("decode", Mode.TP, Mode.SP): 0.6}
        for step in range(1, 2000):
            selector.choose(StepState(num_tokens=4))
            if selector.must_agree_on_drift:
                asked.append(step)
                selector.set_doubts(doubts)
        assert asked == [512, 1024, 1536]
        assert selector.policy.doubts == doubts and selector.policy_text == text
        assert selector.choose(StepState(num_tokens=4, num_waiting=99)).mode is Mode.SP
        selector.policy = FixedMode(Mode.TP)
        selector.set_doubts(doubts)
        assert selector.policy == FixedMode(Mode.TP) and not selector.must_agree_on_drift


class TestMargin:
    def test_without_enough_chunks_it_is_1(self):
        drift = Drift()
        for _ in range(MIN_STEPS - 1):
            drift.add_chunk(1.0, 3.0)
        assert drift.margin == 1.0
        drift.add_chunk(1.0, 3.0)
        assert drift.margin == pytest.approx(1 / 3)
        drift.clear()
        assert drift.margin == 1.0

    def test_it_covers_nine_of_ten_chunks(self):
        rng, drift = random.Random(0), Drift()
        ratios = [rng.uniform(0.8, 1.6) for _ in range(DRIFT_STEPS)]
        for ratio in [9.0] * 50 + ratios:  # the first ones are forgotten
            drift.add_chunk(0.1, 0.1 * ratio)
        share = sum(ratio * drift.margin <= 1 + 1e-9 for ratio in ratios) / len(ratios)
        assert 0.89 < share < 0.92

    def test_times_that_a_clock_cannot_have_measured_and_fast_steps(self):
        drift = Drift()
        for seconds in (0.0, -1.0, 1e9, float("nan")):
            drift.add_chunk(0.1, seconds)
        drift.add_chunk(0.0, 1.0)
        for _ in range(MIN_STEPS):
            drift.add_chunk(0.1, 0.05)
        assert drift.margin == 1.0


def test_a_probe_is_no_longer_than_the_bound_while_requests_decode():
    costs = fit(
        [
            Measurement(phase, mode, tokens, tokens, seconds * (1.0 if mode is Mode.TP else 1.1))
            for phase in ("prefill", "decode")
            for mode in Mode
            for tokens, seconds in ((1, 0.1), (1000, 0.2))
        ]
    )

    def probes(longest, running):
        selector = ModeSelector(Calibrated(costs, 1000))
        selector.longest_probe = longest
        steps = (StepState(1000, 1000, num_running=running) for _ in range(2000))
        return sum(selector.choose(step).probe for step in steps)

    assert probes(float("inf"), 3) > 0
    assert probes(0.23, 3) == probes(float("inf"), 3)
    assert probes(0.21, 3) == 0
    assert probes(0.21, 0) > 0
