"""The methods that SP steps run in place of others: they come and go, and nothing else of an object changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_shift.modes import Mode
from sglang_shift.parallel.forwards import Forwards
from sglang_shift.parallel.step import Step, current, current_step, run_step


class Layer(torch.nn.Module):
    def forward(self, x):
        return x + 1


class Double:
    def __call__(self, x):
        return 2 * x


def replaced(*owners, function=None, name="forward"):
    forwards = Forwards()
    for owner in owners:
        forwards.replace(owner, function or Double(), name)
    return forwards


def test_an_object_has_our_function_inside_of_the_context_only():
    layer, other = Layer(), Layer()
    before = dict(vars(layer))
    forwards = replaced(layer)
    assert len(forwards) == 1 and layer(5) == 6, "to list a method changes nothing"
    with forwards.installed():
        assert layer(5) == 10 and layer.forward(5) == 10
        assert other(5) == 6, "another object of the class has its own method"
    assert layer(5) == 6 and vars(layer) == before


def test_a_parent_calls_the_functions_of_its_children():
    model = torch.nn.Sequential(Layer(), torch.nn.Sequential(Layer(), Layer()))
    assert model(1) == 4
    with replaced(model[1][0]).installed():
        assert model(1) == 5
        with replaced(model[1]).installed():
            assert model(1) == 4, "the parent's function is called, and the child's is not"
        assert model(1) == 5
    assert model(1) == 4


def test_an_attribute_of_the_object_itself_is_there_again():
    """SGLang's graph runners, for example, put a function of theirs into a model."""
    layer = Layer()
    layer.forward = theirs = lambda x: x + 100
    with replaced(layer).installed():
        assert layer(5) == 10
    assert layer.forward is theirs and layer(5) == 105


@pytest.mark.parametrize("own", [False, True])
def test_an_error_leaves_nothing_behind(own):
    layer = Layer()
    if own:
        layer.forward = lambda x: x + 100
    before = dict(vars(layer))
    with pytest.raises(ZeroDivisionError), replaced(layer, Layer()).installed():
        raise ZeroDivisionError
    assert vars(layer) == before


def test_a_function_that_someone_took_away_meanwhile_is_no_error():
    layer = Layer()
    with replaced(layer).installed():
        del layer.forward
    assert layer(5) == 6


def test_the_last_of_two_functions_for_one_method_counts():
    layer = Layer()
    forwards = replaced(layer)
    forwards.replace(layer, lambda x: -x)
    with forwards.installed():
        assert layer(5) == -5
    assert layer(5) == 6 and "forward" not in vars(layer)


def test_contexts_in_each_other_end_in_their_order():
    layer, forwards = Layer(), Forwards()
    forwards.replace(layer, Double())
    with forwards.installed():
        with replaced(layer, function=lambda x: -x).installed():
            assert layer(5) == -5
        assert layer(5) == 10
    assert "forward" not in vars(layer)


def test_a_method_of_another_name_of_any_object():
    group = SimpleNamespace(all_reduce=sum)
    with replaced(group, function=max, name="all_reduce").installed():
        assert group.all_reduce([1, 2]) == 2
    assert group.all_reduce is sum


def test_an_attribute_that_is_no_method():
    block = SimpleNamespace(stream="second")
    forwards = Forwards()
    forwards.replace(block, None, "stream")
    with forwards.installed():
        assert block.stream is None
    assert block.stream == "second"


@pytest.mark.parametrize("mode", Mode)
def test_only_steps_in_sp_have_our_functions(mode):
    layer = Layer()
    step = Step(mode, None, None, replaced(layer))  # type: ignore[arg-type]
    with run_step(step):
        assert current_step() is step
        assert layer(5) == (10 if mode is Mode.SP else 6)
        assert ("forward" in vars(layer)) is (mode is Mode.SP), "a TP step runs exactly SGLang's code"
    assert layer(5) == 6 and current() is None


def test_a_step_that_fails_has_none_left():
    layer = Layer()
    with pytest.raises(ZeroDivisionError), run_step(Step(Mode.SP, None, None, replaced(layer))):  # type: ignore[arg-type]
        raise ZeroDivisionError
    assert "forward" not in vars(layer) and current() is None


def test_outside_of_a_step_there_is_none():
    with pytest.raises(AssertionError, match="in a step only"):
        current_step()
