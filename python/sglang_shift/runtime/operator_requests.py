"""Check requests of operators before a rank receives them. Each of them would raise an error in a rank, and end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.runtime_context import get_device, get_exec, get_parallel

from sglang_shift.errors import RequestRefused
from sglang_shift.seams import relies_on

MOST_SECONDS = 3600
"""The longest sleep before a step. Python cannot sleep for an unlimited time."""
MOST_BYTES = 100
"""The longest part of the name of a profile. The whole name must fit a file system."""
ACTIVITIES = ("CPU", "GPU")
ACTIVITIES_OF_CUDA = (*ACTIVITIES, "MEM", "CUDA_PROFILER")


@relies_on(
    "sglang.srt.eplb.expert_distribution:ExpertDistributionRecorder._on_not_implemented",
    "This method raises an error in the rank if the server records no experts.",
)
def check_recorder() -> None:
    """Check that the server can record which experts its tokens choose.

    Raises:
        RequestRefused: it has no recorder.
    """
    if get_exec().moe.expert_distribution_recorder_mode is None:
        raise RequestRefused("the server records no experts; restart it with --expert-distribution-recorder-mode")


def check_tags(tags: Sequence[str] | None) -> None:
    """Check the kinds of memory that the ranks release or resume.

    Raises:
        RequestRefused: the server has no such memory.
    """
    if get_device().device == "cpu" and not get_exec().features.enable_memory_saver:
        raise RequestRefused("memory can be released on GPUs only, and this server runs on CPUs; leave it out")
    for index, tag in enumerate(tags or ()):
        if tag not in GPU_MEMORY_ALL_TYPES:
            raise RequestRefused(f"tags has {tag!r}; give {', '.join(GPU_MEMORY_ALL_TYPES)}")
        if tag in (tags or ())[:index]:
            raise RequestRefused(f"tags has {tag!r} twice; give it once")


def check_sleep(seconds: float | None) -> None:
    """Check how long each step is delayed.

    Raises:
        RequestRefused: it is no number, or longer than :data:`MOST_SECONDS`.
    """
    if seconds is not None and not seconds <= MOST_SECONDS:  # this is also true of NaN
        raise RequestRefused(f"forward_sleep_time is {seconds} and must be at most {MOST_SECONDS} seconds")


@relies_on(
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._stop_profile",
    "This method makes the name of the file from the prefix and the id.",
)
@relies_on(
    "sglang.srt.managers.scheduler_components.profiler_manager:SchedulerProfilerManager._profile_batch_predicate",
    "This method counts the steps of each stage only if the number of steps is given.",
)
def check_profile(request: Any) -> None:
    """Check what is profiled, and the name of its file.

    Args:
        request: SGLang's ``ProfileReq``.

    Raises:
        RequestRefused: the ranks could not profile it, or could not write the file.
    """
    for name in ("profile_prefix", "profile_id"):
        part = getattr(request, name) or ""
        if "/" in part or "\0" in part or len(part.encode(errors="replace")) > MOST_BYTES:
            raise RequestRefused(
                f"{name} {part[:MOST_BYTES]!r} is no part of a file's name; give at most {MOST_BYTES} bytes without /"
            )
    known = ACTIVITIES_OF_CUDA if torch.cuda.is_available() else ACTIVITIES
    for activity in request.activities or ():
        if activity not in known:
            raise RequestRefused(f"activities has {activity!r}; give {', '.join(known)}")
    if request.profile_by_stage and not request.num_steps:
        raise RequestRefused("profile_by_stage needs the number of steps; give num_steps")


@relies_on(
    "sglang.srt.managers.tp_worker:BaseTpWorker.deserialize_own_rank",
    "This method takes the tensors of this rank by its number.",
)
def lacks_tensors(request: Any) -> str:
    """Why the tensors of a weight update or an adapter do not suffice for all ranks; empty if they do."""
    given, ranks = len(request.serialized_named_tensors), get_parallel().tp_size
    return f"serialized_named_tensors has {given} and must have one for each of {ranks} ranks" if given < ranks else ""
