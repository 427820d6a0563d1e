"""Tracks weight updates that take several requests, so that instances do not change in the middle of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers import io_struct

from sglang_shift.seams import relies_on

UPDATING = "a weight update is open; end it (/end_weight_update) before instances merge or split"


@dataclass
class WeightUpdates:
    """The weight updates that the ranks have begun, as the answers of the ranks tell.

    Attributes:
        open: Whether an update is open. Weights may then be partly new.
        groups: The names of the process groups over which trainers send weights.
    """

    open: bool = False
    groups: set[str] = field(default_factory=set)

    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update",
        "This method opens an update, which other requests continue and end.",
    )
    @relies_on(
        "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.end_weight_update",
        "This method fails only if no update is open.",
    )
    @relies_on(
        "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.destroy_weights_update_group",
        "This method also forgets a group that it could not destroy.",
    )
    def answered(self, request: Any, answer: Any) -> None:
        """Learn what the ranks answered to a control request."""
        match request:
            case io_struct.BeginWeightUpdateReqInput():
                self.open |= answer.success
            case io_struct.EndWeightUpdateReqInput():
                self.open = False
            case io_struct.InitWeightsUpdateGroupReqInput() if answer.success:
                self.groups.add(request.group_name)
            case io_struct.DestroyWeightsUpdateGroupReqInput():
                self.groups.discard(request.group_name)
