import pytest
from sglang_shift.modes import FixedMode, Mode, StepState, TokenThreshold, make_policy


def step(tokens: int) -> StepState:
    return StepState(num_tokens=tokens, num_prefill_tokens=0, num_running=1, num_waiting=0)


@pytest.mark.parametrize(("tokens", "mode"), [(1, Mode.TP), (256, Mode.TP), (257, Mode.SP), (100_000, Mode.SP)])
def test_threshold_is_exclusive(tokens, mode):
    assert TokenThreshold(256).choose(step(tokens)) is mode


def test_threshold_zero_is_always_sp():
    assert TokenThreshold(0).choose(step(1)) is Mode.SP


@pytest.mark.parametrize("mode", list(Mode))
def test_fixed_modes(mode):
    policy = make_policy(mode.value, 256)
    assert policy == FixedMode(mode)
    assert {policy.choose(step(n)) for n in (1, 10_000)} == {mode}


def test_unknown_policy_names_the_known_ones():
    with pytest.raises(ValueError, match="tokens, tp, sp"):
        make_policy("fastest", 256)
