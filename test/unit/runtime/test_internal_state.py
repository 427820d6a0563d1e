"""What a request may set while the server runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.managers.scheduler_components import internal_state as stock
from sglang_shift.config import ShiftConfig
from sglang_shift.runtime.internal_state import ShiftInternalState


@pytest.mark.parametrize(("value", "taken"), [(80, False), (0, True)])
def test_instances_take_no_bound_on_gaps(monkeypatch, caplog, value, taken):
    """Their leaders measure different step times, so the ranks of a merged instance would fill steps differently."""
    monkeypatch.setattr(stock, "get_context", lambda: SimpleNamespace(override=lambda **_: None))
    config = ShiftConfig(2, 2, switching=True, policy="calibrated", instances=2)
    taken_configs = []
    scheduler = SimpleNamespace(
        shift_config=config, shift_selector=SimpleNamespace(calibration=object()), chunked_prefill_size=64,
        shift_reporter=None, set_policy=taken_configs.append,
    )  # fmt: skip
    state = ShiftInternalState(scheduler, record_step_time=False)
    with caplog.at_level(logging.WARNING):
        output = state.set_internal_state(SetInternalStateReq(server_args={"shift_tbt_target": value}))
    assert output.updated == taken == bool(taken_configs)
    assert ("shift_tbt_target cannot be combined with --instances" in caplog.text) == (not taken)
