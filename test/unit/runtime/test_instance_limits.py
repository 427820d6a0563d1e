"""What follows from the size of another instance, over a stand-in for the scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from sglang_shift.runtime import instance_scheduler as module
from sglang_shift.runtime.instance_scheduler import InstanceScheduler


class Scheduler:
    """It limits outputs to 100 tokens."""

    renew_limits = InstanceScheduler.renew_limits

    def init_req_max_new_tokens(self, req):
        req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, 100)


@pytest.mark.parametrize("to_finish", [None, "an abort"])
def test_the_limits_of_an_instance_before_do_not_stay(to_finish):
    """This holds for aborted requests, too: another rank makes them again, and both must admit the same requests."""
    asked = SimpleNamespace(max_new_tokens=1000, min_new_tokens=30)
    limited = SimpleNamespace(max_new_tokens=20, min_new_tokens=20)
    req = SimpleNamespace(
        sampling_params=limited, shift_request=SimpleNamespace(sampling_params=asked), to_finish=to_finish
    )
    Scheduler().renew_limits(req)
    assert (limited.max_new_tokens, limited.min_new_tokens) == (100, 30)


def test_the_gauges_have_the_size_of_the_instance(monkeypatch):
    monkeypatch.setattr(module, "compare_in", lambda group: None)
    monkeypatch.setattr(module, "SchedulerRecvSkipper", MagicMock())
    scheduler, told = MagicMock(max_total_num_tokens=4000), []
    scheduler._sizes.return_value = (1000, 999, 994)
    scheduler.emit_metrics_constants = lambda: told.append(scheduler.max_total_num_tokens)
    InstanceScheduler.enter_instance(scheduler, 1)
    assert told == [1000]
