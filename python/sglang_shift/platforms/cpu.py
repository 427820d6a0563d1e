"""An out-of-tree SGLang platform for machines without a GPU.

With it the published wheels of SGLang run on any CPU. On a machine with an accelerator
:func:`activate` returns None and SGLang's own platforms serve as ever.
"""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_shift.errors import SeamError
from sglang_shift.models.heads import kv_heads_of_rank
from sglang_shift.seams import extends, put_in_place, replaces
from sglang_shift.start_up_log import leave_out_cpu

# Collectives whose custom ops SGLang registers, on an out-of-tree platform, for PrivateUse1 only.
COLLECTIVES = (
    "inplace_all_reduce",
    "outplace_all_reduce",
    "reg_all_gather_into_tensor",
    "reg_reduce_scatter_tensor",
    "reg_all_to_all_single",
)
# Of the memory that is free at start-up, what the KV pools of all local ranks may take together.
KV_FRACTION = 0.4
# A pool of more full-length requests than this gains nothing on a CPU.
KV_MAX_REQUESTS = 64


def activate() -> str | None:
    """SGLang's platform entry point: our platform's name, or None where there is an accelerator."""
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    leave_out_cpu()
    return "sglang_shift.platforms.cpu:ShiftCpuPlatform"


@extends(
    "sglang.srt.platforms.interface:SRTPlatform", "attention backend, threads and KV pools on a machine without a GPU"
)
class ShiftCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """torch-native attention, gloo collectives, threads and memory shared out among the ranks."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """The one CPU device, as a string: SGLang compares it with ``"cpu"``."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """The attention backend that needs no kernels."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """No compiler is assumed."""
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        """What ``/start_profile`` records here."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """What ``/start_profile`` records here."""
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults for what the user left open; runs in the launcher, before ranks are started."""
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        server_args.disable_custom_all_reduce = True
        ranks = local_ranks(server_args)
        share_cores(ranks)
        # The ranks share one machine's memory: a difference between two readings means nothing.
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = kv_pool_tokens(server_args, ranks)

    def init_backend(self) -> None:
        """Runs in each rank's process while SGLang imports its model runner."""
        register_collectives()
        put_in_place(keep_config)  # here, because stock servers on this platform need it, too


def is_active() -> bool:
    """Whether SGLang runs on this platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, ShiftCpuPlatform)


def verify() -> None:
    """If this platform is the active one, its collectives must be in place.

    Raises:
        SeamError: names what is missing.
    """
    if not is_active():
        return
    if missing := [name for name in COLLECTIVES if not has_cpu_kernel(name)]:
        raise SeamError(f"SGLang's collectives {', '.join(missing)} do not take CPU tensors")


@replaces(
    "sglang.srt.model_executor.model_runner:adjust_config_with_unaligned_cpu_tp",
    "KV heads are replicated as on GPUs; SGLang would pad them up to the TP size, and then fail to load",
    where=is_active,
)
def keep_config(model_config: Any, load_config: Any, tp_size: int) -> Any:
    """In place of SGLang's ``adjust_config_with_unaligned_cpu_tp``: the model as it is."""
    return model_config


def register_collectives() -> None:
    """Let SGLang's collective custom ops take CPU tensors; once per process."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.utils.common import sglang_lib

    for name in COLLECTIVES:
        if not has_cpu_kernel(name):
            sglang_lib.impl(name, getattr(parallel_state, name).__wrapped__, "CPU")


def has_cpu_kernel(name: str) -> bool:
    """Whether SGLang's custom op ``name`` takes CPU tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sglang::{name}", "CPU")


def local_ranks(server_args: Any) -> int:
    """Ranks that this node runs."""
    return max(1, server_args.dp_size * server_args.tp_size * server_args.pp_size // server_args.nnodes)


def share_cores(ranks: int) -> None:
    """Give each rank its share of this machine's cores; inherited by the processes started later."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(each))
    groups = [[cores[(rank * each + i) % len(cores)] for i in range(each)] for rank in range(ranks)]
    # SGLang wants a group for each rank where there are more ranks than NUMA nodes.
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, g)) for g in groups))


def kv_pool_tokens(server_args: Any, ranks: int) -> int:
    """Tokens that fit the KV pools of all local ranks into :data:`KV_FRACTION` of the free memory.

    ``--mem-fraction-static``, where given, takes the place of that fraction.
    """
    from sglang.srt.arg_groups.overrides import model_config_of

    config = model_config_of(server_args)
    heads = kv_heads_of_rank(config.get_total_num_kv_heads(), server_args.tp_size)
    per_token = 2 * heads * config.head_dim * config.num_hidden_layers * config.dtype.itemsize
    fraction = server_args.mem_fraction_static or KV_FRACTION
    fits = int(psutil.virtual_memory().available * fraction / ranks / per_token)
    return min(fits, KV_MAX_REQUESTS * config.context_len)
