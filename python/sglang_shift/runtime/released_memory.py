"""Keeps a rank alive if an operator releases memory that is in use or released already, or resumes memory that was not
released."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput, ResumeMemoryOccupationReqOutput
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

from sglang_shift.seams import overrides

logger = logging.getLogger(__name__)


class ShiftWeightUpdaterManager(SchedulerWeightUpdaterManager):
    """SGLang's manager, which does nothing where SGLang would raise an error.

    All ranks of a replica have the same state, so they do the same. SGLang's answers have no room for an error, so the
    log has it.
    """

    __slots__ = ()

    @overrides(
        "Our method releases nothing while a request runs, and nothing twice, instead of an error that ends the server."
    )
    def release_memory_occupation(self, recv_req: Any) -> ReleaseMemoryOccupationReqOutput:
        paused = self.scheduler is not None and self.scheduler._engine_paused
        if not self.is_fully_idle(ignore_waiting=paused):
            logger.error("sglang_shift: no memory was released, because requests run; wait for them, or abort them")
            return ReleaseMemoryOccupationReqOutput()
        asked = recv_req.tags or GPU_MEMORY_ALL_TYPES
        if again := sorted(self.offload_tags.intersection(asked)):
            logger.warning("sglang_shift: %s was released before, and stays so", " and ".join(again))
        tags = [tag for tag in asked if tag not in self.offload_tags]
        if not tags:
            return ReleaseMemoryOccupationReqOutput()
        return super().release_memory_occupation(msgspec.structs.replace(recv_req, tags=tags))

    @overrides("Our method resumes nothing if memory was not released, instead of an error that ends the server.")
    def resume_memory_occupation(self, recv_req: Any) -> ResumeMemoryOccupationReqOutput:
        if missing := set(recv_req.tags or GPU_MEMORY_ALL_TYPES) - self.offload_tags:
            logger.error(
                "sglang_shift: no memory was resumed, because %s was not released; give the tags that were released",
                " and ".join(sorted(missing)),
            )
            return ResumeMemoryOccupationReqOutput()
        return super().resume_memory_occupation(recv_req)
