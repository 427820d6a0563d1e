"""Defines an out-of-tree SGLang platform for machines without a GPU.

With it, the published wheels of SGLang run on any CPU. If the machine has an accelerator, :func:`activate` returns
None, and SGLang uses its own platforms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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

# SGLang registers the custom ops of these collectives only for PrivateUse1 on an out-of-tree platform.
COLLECTIVES = (
    "inplace_all_reduce",
    "outplace_all_reduce",
    "reg_all_gather_into_tensor",
    "reg_reduce_scatter_tensor",
    "reg_all_to_all_single",
)
# SGLang's name for the backend that serves every model: its rules for single models accept this name and no new one.
# Triton's kernels cannot run here. So on this platform the name means our backend (platforms/attention_backend.py).
ATTENTION = "triton"
# The share of the memory that is free at start-up which the KV pools of all local ranks may take together.
KV_FRACTION = 0.4
# The algorithms of speculative decoding whose draft models run here. SGLang resolves NEXTN to EAGLE.
DRAFT_MODELS = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
# SGLang's own choice for most models, by field: the steps of a draft model, the drafts of a step for each draft of the
# step before, and the tokens that the model verifies.
CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
# On a CPU, a larger pool than for this number of full-length requests gains nothing.
KV_MAX_REQUESTS = 64


def activate() -> str | None:
    """Return our platform's name, or None if there is an accelerator. This is SGLang's entry point for platforms."""
    if torch.accelerator.is_available() or os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    leave_out_cpu()
    return "sglang_shift.platforms.cpu:ShiftCpuPlatform"


@extends(
    "sglang.srt.platforms.interface:SRTPlatform",
    "Our platform chooses attention, threads and KV pools on a machine without a GPU.",
)
class ShiftCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Uses our attention backend and gloo collectives, and shares threads and memory among the ranks."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """Return the only CPU device as a string, because SGLang compares it with ``"cpu"``."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Return the name under which :meth:`init_backend` registers our attention backend."""
        return ATTENTION

    def get_compile_backend(self, mode: str | None = None) -> str:
        """Return ``eager``, because there may be no compiler."""
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        """Return what ``/start_profile`` records here."""
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set defaults for arguments that the user left open. This runs in the launcher, before the ranks start."""
        if server_args.attention_backend in (None, "intel_amx"):  # SGLang's default for its own CPU engine
            server_args.attention_backend = ATTENTION
        if server_args.moe_runner_backend == "auto":  # other runners want other layouts of the experts' weights
            server_args.moe_runner_backend = "triton"
        if server_args.lora_backend == "csgmv":  # SGLang's default, which needs Triton
            server_args.lora_backend = "torch_native"
        propose_chains(server_args)
        if not self.capabilities.graph_capture:
            server_args.cuda_graph_config = without_graphs(server_args.cuda_graph_config)
        server_args.disable_custom_all_reduce = True
        ranks = local_ranks(server_args)
        share_cores(ranks)
        # The ranks share the memory of one machine, so a difference between two readings means nothing.
        os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        os.environ.setdefault("SGLANG_NATIVE_MOVE_KV_CACHE", "1")  # SGLang's other way is a Triton kernel
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = kv_pool_tokens(server_args, ranks)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Whether the platform has what SGLang's draft worker for ``algorithm`` needs."""
        return algorithm in DRAFT_MODELS

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        """Return None for SGLang's own worker, which needs our kernels on this platform."""
        from sglang_shift.platforms import speculation

        speculation.register()
        return None

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        """Return our function that reads the KV slots of drafts."""
        from sglang_shift.platforms.speculation import slots_of

        return slots_of

    def init_backend(self) -> None:
        """Prepare a rank's process, of a stock server too. SGLang calls this while it imports its model runner."""
        from sglang_shift.platforms import fallbacks, token_shards
        from sglang_shift.platforms.lora import CpuLoRAManager

        register_collectives()
        put_in_place(keep_config)
        put_in_place(CpuLoRAManager)
        token_shards.register()
        fallbacks.register()


def is_active() -> bool:
    """Return whether SGLang runs on this platform."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, ShiftCpuPlatform)


def verify() -> None:
    """Check that SGLang's collectives take CPU tensors, if this platform is active.

    Raises:
        SeamError: some collectives do not take them. The message names these collectives.
    """
    if not is_active():
        return
    if missing := [name for name in COLLECTIVES if not has_cpu_kernel(name)]:
        raise SeamError(f"SGLang's collectives {', '.join(missing)} do not take CPU tensors")


@replaces(
    "sglang.srt.model_executor.model_runner:adjust_config_with_unaligned_cpu_tp",
    "SGLang would pad KV heads up to the TP size, and then fail to load. We replicate KV heads, as on GPUs.",
    when=is_active,
)
def keep_config(model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Return the model's configuration without a change, in place of ``adjust_config_with_unaligned_cpu_tp``."""
    return model_config


def register_collectives() -> None:
    """Let SGLang's collective custom ops take CPU tensors, once per process."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.utils.common import sglang_lib

    for name in COLLECTIVES:
        if not has_cpu_kernel(name):
            sglang_lib.impl(name, getattr(parallel_state, name).__wrapped__, "CPU")


def has_cpu_kernel(name: str) -> bool:
    """Return whether SGLang's custom op ``name`` takes CPU tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sglang::{name}", "CPU")


def propose_chains(server_args: Any) -> None:
    """Let a draft model propose one token after the other, if the user has left open how it proposes.

    For some models, SGLang would choose trees of tokens, for which the platform has no attention.
    """
    with_draft_model = (server_args.speculative_algorithm or "").upper() in DRAFT_MODELS
    is_open = not server_args.speculative_adaptive and all(getattr(server_args, name) is None for name in CHAIN)
    if with_draft_model and is_open:
        for name, value in CHAIN.items():
            setattr(server_args, name, value)


def without_graphs(config: Any) -> Any:
    """Return SGLang's ``cuda_graph_config`` with no graphs. SGLang does this for ``torch_native`` by itself."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    for phase in Phase.ALL:
        config = with_phase(config, phase, backend=Backend.DISABLED)
    return config


def local_ranks(server_args: Any) -> int:
    """Return the number of ranks that this node runs."""
    return max(1, server_args.dp_size * server_args.tp_size * server_args.pp_size // server_args.nnodes)


def share_cores(ranks: int) -> None:
    """Give each rank its share of this machine's cores. Processes that start later inherit the shares."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(each))
    groups = [[cores[(rank * each + i) % len(cores)] for i in range(each)] for rank in range(ranks)]
    # If there are more ranks than NUMA nodes, SGLang requires a group of cores for each rank.
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, g)) for g in groups))


def kv_pool_tokens(server_args: Any, ranks: int) -> int:
    """Return the tokens that fit into each rank's KV pool, if all local ranks share :data:`KV_FRACTION` of free memory.

    If ``--mem-fraction-static`` is given, it replaces that fraction. If D ranks divide the tokens of a request, a pool
    of 1/D of them is as large.
    """
    from sglang.srt.arg_groups.overrides import model_config_of

    config = model_config_of(server_args)
    per_token = kv_width(config, server_args.tp_size) * config.num_hidden_layers * config.dtype.itemsize
    fraction = server_args.mem_fraction_static or KV_FRACTION
    fits = int(psutil.virtual_memory().available * fraction / ranks / per_token)
    return min(fits, -(-KV_MAX_REQUESTS * config.context_len // server_args.dcp_size))


def kv_width(config: Any, tp_size: int) -> int:
    """Return how many numbers a rank caches for a token in each layer: keys and values, or MLA's latents."""
    from sglang.srt.configs.model_config import AttentionArch

    if config.attention_arch == AttentionArch.MLA:
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    return int(2 * kv_heads_of_rank(config.get_total_num_kv_heads(), tp_size) * config.head_dim)
