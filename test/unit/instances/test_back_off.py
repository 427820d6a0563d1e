"""The time between two tries of a layout that the ranks have given up."""

from __future__ import annotations

from sglang_shift.instances.back_off import BackOff


def test_the_time_doubles_up_to_a_limit_and_begins_again():
    back_off = BackOff(first=4.0, most=16.0)
    assert back_off.allows((1, 1), 0.0)
    now = 0.0
    for seconds in (4.0, 8.0, 16.0, 16.0):
        back_off.fail((1, 1), now)
        assert not back_off.allows((1, 1), now + seconds - 0.1)
        now += seconds
        assert back_off.allows((1, 1), now)
    back_off.succeed()
    assert back_off.allows((1, 1), now)
    back_off.fail((1, 1), now)
    assert back_off.allows((1, 1), now + 4.0)


def test_another_layout_may_be_tried_at_once():
    back_off = BackOff(first=4.0)
    back_off.fail((1, 1, 2), 0.0)
    assert back_off.allows((2, 2), 0.1) and not back_off.allows((1, 1, 2), 0.1)
    back_off.fail((2, 2), 0.1)
    assert not back_off.allows((2, 2), 4.0)


def test_each_layout_has_its_own_time():
    back_off = BackOff(first=4.0)
    back_off.fail((1, 1, 2), 0.0)
    back_off.fail((2, 1, 1), 3.0)
    assert back_off.denied(3.0) == {(1, 1, 2), (2, 1, 1)} and back_off.denied(4.0) == {(2, 1, 1)}
    back_off.fail((1, 1, 2), 4.0)
    assert back_off.denied(11.0) == {(1, 1, 2)}, "the second time of this layout is twice as long"
    assert not back_off.denied(12.0)
    back_off.fail((1, 1, 2), 12.0)
    back_off.succeed()
    assert not back_off.denied(12.0)
