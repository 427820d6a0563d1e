"""Says whether SGLang's profiler runs, or waits for a step.

The ranks that began a profile must also end it together. They count their steps, so all of them must run the same ones.
"""

from __future__ import annotations

from typing import Any

from sglang_shift.seams import relies_on


@relies_on(
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._profile_batch_predicate",
    "This method begins and ends profiles by the number of a step, or by the steps of each phase.",
)
@relies_on(
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._stop_profile",
    "This method waits for all ranks that began the profile, and forgets the step at which it should begin.",
)
@relies_on(
    "sglang.srt.utils.profile_utils:_StageBasedTrigger",
    "With SGLANG_PROFILE_V2, this class keeps the phases whose profile has not ended.",
)
def profile_is_open(manager: Any) -> bool:
    """Whether a profile runs, or will begin at a later step.

    Args:
        manager: SGLang's ``SchedulerProfilerManager``.
    """
    if hasattr(manager, "_profile_manager"):
        return bool(manager._profile_manager.stage_based_trigger.stage_configs)
    if manager.profile_in_progress or manager.profiler_start_forward_ct is not None:
        return True
    begins_later = 0 in (manager.profiler_prefill_ct, manager.profiler_decode_ct)
    return bool(manager.profile_by_stage and begins_later)
