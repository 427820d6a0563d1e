"""Runs a server whose KV cache continues in host memory, without a GPU.

SGLang's copies between device and host are CUDA kernels. Here one of them is PyTorch's indexing, and host memory is not
registered with CUDA. All else is SGLang's: which pages are written and loaded, when, and who waits for them.

python test/support/host_cache_server.py --port N [the flags of launch_server]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from sglang_shift.runtime import scheduler

run_rank = scheduler.run_scheduler_process


def transfer_kv_direct(
    *, src_layers: list[torch.Tensor], dst_layers: list[torch.Tensor], src_indices: torch.Tensor,
    dst_indices: torch.Tensor, page_size: int,
) -> None:  # fmt: skip
    """Copy the rows of tokens in each tensor."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.mem_cache.pool_host import common, mha

    mha.transfer_kv_direct = transfer_kv_direct
    common.ALLOC_MEMORY_FUNCS["cpu"] = lambda *args, **kwargs: common.alloc_with_host_register(
        *args, **{**kwargs, "pin_memory": False}
    )
    run_rank(*args, **kwargs)


if __name__ == "__main__":
    from sglang_shift import launch_server

    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
