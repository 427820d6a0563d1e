"""Puts all ranks of SGLang's CUDA platform on the first GPU. SGLang's processes load this module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sglang.srt.platforms.cuda import CudaSRTPlatform

from sglang_shift.tools.gpu_check.one_gpu import BACKEND_VARIABLE


def activate() -> str:
    """Return the name of the platform's class to SGLang, which calls this entry point."""
    return "sglang_shift.tools.gpu_check.one_gpu_platform:OneGpuPlatform"


class OneGpuPlatform(CudaSRTPlatform):
    """A platform on which every rank uses the first GPU."""

    @contextmanager
    def reindex_device_id(self, device_id: int) -> Iterator[int]:
        """Yield device 0 for any rank."""
        yield 0

    def get_torch_distributed_backend_str(self) -> str:
        """Return ``gloo`` or ``nccl``."""
        return os.environ[BACKEND_VARIABLE]
