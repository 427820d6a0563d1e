"""What step times depend on besides the model and P and S: settings of the server, links, libraries."""

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
    "enable_mixed_chunk",
    "enable_mscclpp",
    "enable_nccl_nvls",
    "enable_symm_mem",
    "enable_torch_symm_mem",
    "flashinfer_allreduce_fusion_backend",
)
"""SGLang's settings that change what a collective or a step costs, and not alike in both modes."""

VARIABLES = re.compile(r"NCCL_|GLOO_|SGLANG_\w*ALL_?REDUCE")
"""How the names of environment variables begin that do."""
NO_MATTER = ("NCCL_COMM_ID", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")


def settings_of(scheduler: Any, chunk: int, places: Sequence[str]) -> dict[str, Any]:
    """The settings, as JSON.

    Args:
        scheduler: A :class:`sglang_shift.runtime.scheduler.ShiftScheduler`, built.
        chunk: Prompt tokens of the largest step.
        places: What :func:`place` says on each rank.
    """
    runner = scheduler.tp_worker.model_runner
    settings = {
        "chunk": chunk,
        "max_running": scheduler.max_running_requests,
        "context_length": scheduler.model_config.context_len,
        "attention": type(runner.attn_backend).__name__,
        "kv_cache_dtype": str(runner.kv_cache_dtype),
        "page_size": get_schedule().page_size,
        # The one that was obtained, which is not always the one that was asked for.
        "exchange": runner.topology.exchange.text,
        "topology": topology(places),
        "flashinfer": flashinfer_version(),
        "environment": communication_environment(),
        **{name: resolution_result(scheduler.server_args, name) for name in SERVER_ARGS},
    }
    if captured := runner.graphs.captured():
        settings["graphs"] = captured
    return settings


def place() -> str:
    """Where this rank runs: its host, and how many NVLinks its GPU has."""
    return f"{socket.gethostname()} {nvlinks()}"


def topology(places: Sequence[str]) -> list[str]:
    """Which ranks share a host, and their NVLinks: hosts are numbered, because their names may change."""
    hosts: dict[str, int] = {}
    parts = [place.rpartition(" ") for place in places]
    return [f"host {hosts.setdefault(host, len(hosts))}, {links} NVLinks" for host, _, links in parts]


def nvlinks() -> int:
    """The active NVLinks of this rank's GPU; 0 where there are none, or nobody can say."""
    if not torch.cuda.is_available():
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return sum(_link_is_active(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS))
    except Exception:  # no NVML, or a driver that does not tell: one setting fewer to tell deployments apart by
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
    """What the environment tells the libraries that communicate."""
    names = sorted(name for name in os.environ if VARIABLES.match(name) and name not in NO_MATTER)
    return {name: os.environ[name] for name in names}
