"""Collects the settings, links and libraries that step times depend on, besides the model, P and S."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.runtime_context import get_schedule

SERVER_ARGS = (
    "bf16_gemm_backend",
    "disable_custom_all_reduce",
    "disable_overlap_schedule",
    "enable_lora",
    "enable_mixed_chunk",
    "enable_mscclpp",
    "enable_nccl_nvls",
    "enable_symm_mem",
    "enable_torch_symm_mem",
    "ep_size",
    "flashinfer_allreduce_fusion_backend",
    "fp4_gemm_runner_backend",
    "fp8_gemm_runner_backend",
    "moe_runner_backend",
    "quantization",
)
"""SGLang's settings that change the time of a collective or of a step differently in the two modes."""

VARIABLES = re.compile(r"NCCL_|GLOO_|SGLANG_\w*ALL_?REDUCE")
"""Environment variables with such a name change these times, too."""
IGNORED_VARIABLES = ("NCCL_COMM_ID", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")
"""Variables with such a name that do not change these times."""


def settings_of(scheduler: Any, chunk: int, places: Sequence[str]) -> dict[str, Any]:
    """The settings, as a JSON value.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler` that is built.
        chunk: Prompt tokens of the largest step.
        places: The result of :func:`host_and_links` on each rank.
    """
    runner = scheduler.tp_worker.model_runner
    settings = {
        "chunk": chunk,
        "max_running": scheduler.max_running_requests,
        "context_length": scheduler.model_config.context_len,
        "attention": type(runner.attn_backend).__name__,
        "kv_cache_dtype": str(runner.kv_cache_dtype),
        "page_size": get_schedule().page_size,
        # The exchange that was built. The flags may have asked for another one.
        "exchange": runner.topology.exchange.text,
        "topology": topology(places),
        "flashinfer": flashinfer_version(),
        "environment": communication_environment(),
        **{name: resolution_result(scheduler.server_args, name) for name in SERVER_ARGS},
    }
    if (shards := resolution_result(scheduler.server_args, "dcp_size", 1)) > 1:
        settings["kv_shards"] = shards
    if (pipeline := resolution_result(scheduler.server_args, "shift_exchange_pipeline", None)) is not None:
        settings["exchange_pipeline"] = pipeline
    if scheduler.shift_width > 1:
        settings["verify_width"] = scheduler.shift_width
    if sizes := runner.graphs.captured_sizes():
        settings["graphs"] = sizes
    return settings


def host_and_links() -> str:
    """Where this rank runs: its host, and how many NVLinks its GPU has."""
    return f"{socket.gethostname()} {nvlinks()}"


def topology(places: Sequence[str]) -> list[str]:
    """For each rank, the number of its host and its NVLinks. Hosts have numbers, because their names may change."""
    hosts: dict[str, int] = {}
    parts = [place.rpartition(" ") for place in places]
    return [f"host {hosts.setdefault(host, len(hosts))}, {links} NVLinks" for host, _, links in parts]


def nvlinks() -> int:
    """The number of active NVLinks of this rank's GPU; 0 if there are none, or if the number is unknown."""
    if not torch.cuda.is_available():
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return sum(_link_is_active(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS))
    except Exception:  # without NVML, the key has one setting less that tells deployments apart
        return 0


def _link_is_active(handle: Any, link: int) -> bool:
    import pynvml

    try:
        return pynvml.nvmlDeviceGetNvLinkState(handle, link) == pynvml.NVML_FEATURE_ENABLED
    except pynvml.NVMLError:  # the GPU has no such link
        return False


def flashinfer_version() -> str:
    """FlashInfer's version, or ``none``."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return "none"


def communication_environment() -> dict[str, str]:
    """The environment variables that configure the communication libraries."""
    names = sorted(name for name in os.environ if VARIABLES.match(name) and name not in IGNORED_VARIABLES)
    return {name: os.environ[name] for name in names}
