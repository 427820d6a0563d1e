"""What a request may set while the server runs."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import SetInternalStateReq
from sglang.srt.managers.scheduler_components import internal_state as stock
from sglang_shift.config import ShiftConfig
from sglang_shift.flags import POLICIES
from sglang_shift.runtime.internal_state import ShiftInternalState


@pytest.mark.parametrize(("value", "weights", "taken"), [(80, "free", False), (0, "free", True), (80, "keep", True)])
def test_instances_that_free_weights_take_no_bound_on_gaps(monkeypatch, caplog, value, weights, taken):
    """Only the steps of the smallest instances are measured then."""
    monkeypatch.setattr(stock, "get_context", lambda: SimpleNamespace(override=lambda **_: None))
    config = ShiftConfig(2, 2, switching=True, policy="calibrated", instances=2, merge_weights=weights)
    taken_configs = []
    scheduler = SimpleNamespace(
        shift_config=config, shift_calibrated=True, chunked_prefill_size=64,
        shift_reporter=None, set_policy=taken_configs.append, disaggregation_mode=DisaggregationMode.NULL,
    )  # fmt: skip
    state = ShiftInternalState(scheduler, record_step_time=False)
    with caplog.at_level(logging.WARNING):
        output = state.set_internal_state(SetInternalStateReq(server_args={"shift_tbt_target": value}))
    assert output.updated == taken == bool(taken_configs)
    assert ("shift_tbt_target cannot be combined with --merge-weights free" in caplog.text) == (not taken)


@pytest.fixture
def make_state(monkeypatch):
    """Returns a function that makes the internal state of a scheduler, and a list of the configurations it sets."""
    monkeypatch.setattr(stock, "get_context", lambda: SimpleNamespace(override=lambda **_: None))

    def make(policy, deterministic=False, **fields):
        configs = []
        scheduler = SimpleNamespace(
            shift_config=ShiftConfig(2, 2, switching=True, policy=policy), shift_reporter=None,
            shift_calibrated=True, chunked_prefill_size=64, set_policy=configs.append,
            server_args=SimpleNamespace(enable_shift_parallel=True, enable_deterministic_inference=deterministic),
            **fields,
        )  # fmt: skip
        return ShiftInternalState(scheduler, record_step_time=False), configs

    return make


@pytest.mark.parametrize(
    ("deterministic", "policy", "taken"), [(True, "tokens", False), (True, "sp", False), (True, "tp", True),
                                           (False, "tokens", True)],
)  # fmt: skip
def test_a_deterministic_server_keeps_its_policy(make_state, caplog, deterministic, policy, taken):
    state, configs = make_state("tp", deterministic)
    with caplog.at_level(logging.WARNING):
        output = state.set_internal_state(SetInternalStateReq(server_args={"shift_policy": POLICIES.index(policy)}))
    assert output.updated == taken == bool(configs)
    assert ("shift_policy cannot change with --enable-deterministic-inference" in caplog.text) == (not taken)


@pytest.mark.parametrize(("mode", "value"), [("prefill", 80), ("decode", 80), ("prefill", 0), ("null", 80)])
def test_prefill_and_decode_servers_take_no_bound_on_gaps(make_state, caplog, mode, value):
    """The launcher refuses it, too: a step of such a server has no prompts, or no decodes."""
    taken = mode == "null" or value == 0
    state, configs = make_state("calibrated", disaggregation_mode=DisaggregationMode(mode))
    with caplog.at_level(logging.WARNING):
        output = state.set_internal_state(SetInternalStateReq(server_args={"shift_tbt_target": value}))
    assert output.updated == taken == bool(configs)
    assert ("shift_tbt_target has no meaning with --disaggregation-mode" in caplog.text) == (not taken)
