"""SGLang's CUDA platform with all ranks on the first GPU. Loaded in SGLang's processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from sglang.srt.platforms.cuda import CudaSRTPlatform

from sglang_shift.tools.gpu_check.one_gpu import BACKEND_VARIABLE


def activate() -> str:
    """SGLang's platform entry point."""
    return "sglang_shift.tools.gpu_check.one_gpu_platform:OneGpuPlatform"


class OneGpuPlatform(CudaSRTPlatform):
    """Every rank's device is the first one."""

    @contextmanager
    def reindex_device_id(self, device_id: int) -> Iterator[int]:
        """Device 0, whichever the rank's would be."""
        yield 0

    def get_torch_distributed_backend_str(self) -> str:
        """``gloo`` or ``nccl``."""
        return os.environ[BACKEND_VARIABLE]
