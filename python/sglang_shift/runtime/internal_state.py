"""Adds the state of the mode selector to SGLang's internal state (``/server_info``, ``/set_internal_state``)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput, SetInternalStateReq
from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController

from sglang_shift.config import ShiftConfig
from sglang_shift.flags import BY_NAME, LIVE_NUMBERS, POLICIES
from sglang_shift.seams import overrides

TARGET = BY_NAME["shift_tbt_target"]


class ShiftInternalState(SchedulerInternalStateController):
    """SGLang's internal state with a ``shift`` entry. A request can also update the policy and its thresholds.

    SGLang's request can only carry numbers. So a policy is its index in :data:`POLICIES` here. The HTTP route
    (:mod:`sglang_shift.observe.routes`) takes names.
    """

    request_values: dict[str, Any]

    @overrides("Our method adds live counters to /server_info.")
    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        output = super().get_internal_state(recv_req)
        output.internal_state["shift"] = self.scheduler.shift_state()
        return output

    @overrides("Our method takes all values of a request together, or none of them.")
    def set_internal_state(self, recv_req: SetInternalStateReq) -> Any:
        """Update all values of the request, or none. Every rank handles the request in the same iteration."""
        self.request_values = recv_req.server_args
        output = super().set_internal_state(recv_req)
        if output.updated and self.scheduler.shift_reporter is not None:
            self.scheduler.shift_reporter.publish_state()
        return output

    @overrides("Our method lets a request set the policy, its thresholds and the bound on gaps at run time.")
    def _update_handlers(self) -> dict[str, Any]:
        handlers = super()._update_handlers()
        handlers["shift_policy"] = internal_state._UpdateHandler(self._validate_policy, self._apply_policy)
        for flag in LIVE_NUMBERS:
            apply = partial(self._apply_number, flag.setting)
            handlers[flag.name] = internal_state._UpdateHandler(self._validate_number, apply)
        handlers[TARGET.name] = internal_state._UpdateHandler(
            self._validate_target, partial(self._apply_number, TARGET.setting)
        )
        return handlers

    def _config_after_request(self) -> ShiftConfig:
        """The configuration after the whole request is applied."""
        config: ShiftConfig = self.scheduler.shift_config
        values = self.request_values
        index = values.get("shift_policy", -1)
        if index in range(len(POLICIES)):
            config = replace(config, policy=POLICIES[int(index)])
        numbers = {flag.setting: values[flag.name] for flag in (*LIVE_NUMBERS, TARGET) if flag.name in values}
        return replace(config, **numbers)

    def _validate_policy(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or value not in range(len(POLICIES)):
            raise internal_state.UpdateRejected(f"{key} must be one of {', '.join(POLICIES)}, got {value!r}.")
        if not self.scheduler.server_args.enable_shift_parallel:
            raise internal_state.UpdateRejected(f"Updating {key} needs --enable-shift-parallel.")
        if self.scheduler.server_args.enable_deterministic_inference and (
            POLICIES[int(value)] != self.scheduler.shift_config.policy
        ):
            raise internal_state.UpdateRejected(
                f"{key} cannot change with --enable-deterministic-inference, because each mode orders sums differently."
            )
        if POLICIES[int(value)] == "calibrated" and not self.scheduler.shift_calibrated:
            raise internal_state.UpdateRejected(
                f"{key} cannot be calibrated: this server has no calibration; start it with --shift-policy calibrated."
            )

    def _validate_number(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise internal_state.UpdateRejected(f"{key} must be 0 or more, got {value!r}.")
        new_config = self._config_after_request()
        policies = BY_NAME[key].policies
        if new_config.policy not in policies:
            raise internal_state.UpdateRejected(
                f"Updating {key} needs the policy {' or '.join(policies)}; it is {new_config.policy}."
            )
        if new_config.leave_requests > new_config.enter_requests or new_config.leave_tokens > new_config.enter_tokens:
            raise internal_state.UpdateRejected("A queue cannot be short again above where it becomes deep.")

    def _validate_target(self, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise internal_state.UpdateRejected(f"{key} must be 0 or more milliseconds, got {value!r}.")
        if value and self.scheduler.shift_config.merge_weights == "free":
            raise internal_state.UpdateRejected(
                f"{key} cannot be combined with --merge-weights free, because the step times of merged instances are "
                f"not measured; set it to 0."
            )
        if value and self.scheduler.disaggregation_mode is not DisaggregationMode.NULL:
            raise internal_state.UpdateRejected(
                f"{key} has no meaning with --disaggregation-mode, because such a server has prompts or decodes, but "
                f"not both; set it to 0."
            )
        if value and not self.scheduler.shift_calibrated:
            raise internal_state.UpdateRejected(
                f"{key} needs step times: this server has none; start it with --shift-policy calibrated."
            )
        if value and self.scheduler.chunked_prefill_size is None:
            raise internal_state.UpdateRejected(
                f"{key} needs chunked prefills: start the server without --chunked-prefill-size -1."
            )

    def _apply_policy(self, key: str, value: Any) -> dict[str, Any]:
        policy = POLICIES[int(value)]
        self.scheduler.set_policy(replace(self.scheduler.shift_config, policy=policy))
        return {key: policy}

    def _apply_number(self, setting: str, key: str, value: float) -> dict[str, Any]:
        self.scheduler.set_policy(replace(self.scheduler.shift_config, **{setting: value}))
        return {key: value}
