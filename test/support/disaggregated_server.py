"""Runs a server of a prefill and decode pair on one machine, with SGLang's Mooncake connection and without RDMA.

Mooncake's transfer engine is replaced. The engine here writes into the memory of another process of this machine. And
events and streams are those of CPUs, where SGLang takes CUDA's.

python test/support/disaggregated_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from sglang_shift.runtime import scheduler

run_rank = scheduler.run_scheduler_process
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))  # the kernel's struct iovec


class TransferEngine:
    """Has the methods of ``mooncake.engine.TransferEngine`` that SGLang calls."""

    def initialize(self, *args: str) -> int:
        LIBC.prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)  # let processes that are no parents write here
        return 0

    def get_rpc_port(self) -> int:
        """Return the last part of the name of this rank's session. Here it is the process."""
        return os.getpid()

    def batch_register_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> int:
        return 0

    def batch_unregister_memory(self, addresses: Sequence[int]) -> int:
        return 0

    def batch_transfer_sync_write(
        self, session: str, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Copy each block from this process into the process of ``session``. Return 0, or a negative error."""
        process = int(session.rpartition(":")[2])
        for source, target, length in zip(sources, targets, lengths, strict=True):
            here, there = IoVector(int(source), int(length)), IoVector(int(target), int(length))
            if LIBC.process_vm_writev(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != length:
                print(f"process_vm_writev: {os.strerror(ctypes.get_errno())}", flush=True)
                return -1
        return 0


mooncake, engine = ModuleType("mooncake"), ModuleType("mooncake.engine")
engine.TransferEngine = TransferEngine
mooncake.engine = engine
sys.modules |= {"mooncake": mooncake, "mooncake.engine": engine}


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    MooncakeKVSender.supports_host_tensor_indices = False  # SGLang would copy them to pinned memory
    torch.cuda.Event = torch.cpu.Event
    run_rank(*args, **kwargs)


if __name__ == "__main__":
    from sglang_shift import launch_server

    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
