"""The order of the queue of an instance, in which running requests wait for a moment after each change of the level."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy, SchedulePolicy

from sglang_shift.seams import overrides, relies_on

GOES_FIRST = "shift_goes_first"
"""The attribute of a request that a change of the level took out of its batch, until SGLang queues it again."""


class RunningFirstPolicy(SchedulePolicy):
    """SGLang's order of the queue. With priorities, those that ran before a change come first among their equals."""

    @overrides("SGLang sorts equal priorities by the time in the queue, which is new for requests that ran.")
    @relies_on(
        "sglang.srt.managers.schedule_policy:SchedulePolicy._sort_by_priority_and_fcfs",
        "This method sorts by the priority, and then by the time when a request came into the queue.",
    )
    def calc_priority(self, waiting_queue: list[Req], *args: Any, **kwargs: Any) -> None:
        super().calc_priority(waiting_queue, *args, **kwargs)
        if self.policy == CacheAgnosticPolicy.FCFS and self.enable_priority_scheduling:
            waiting_queue.sort(key=lambda req: (req.priority * self.priority_sign, not getattr(req, GOES_FIRST, False)))
