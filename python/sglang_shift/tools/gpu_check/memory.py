"""Checks SGLang's memory saver: it releases the weights, and brings back their values for both modes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from sglang_shift.tools.gpu_check import one_gpu
from sglang_shift.tools.gpu_check.answers import compare, make_prompts
from sglang_shift.tools.gpu_check.comparison import SHIFT, START_SECONDS, THRESHOLDS, ask, set_threshold
from sglang_shift.tools.gpu_check.engine import EAGER, SHARED_GPU_FLAGS, VOCABULARY, model_flags
from sglang_shift.tools.gpu_check.record import Record
from sglang_shift.tools.servers import Server, call, serving

SAVER = ["--enable-memory-saver", "--enable-weights-cpu-backup"]
WEIGHTS = {"tags": ["weights"]}
"""What is released and resumed. Without tags SGLang also frees the KV pool, which is larger than the weights."""
TOLERANCE = 1e-3
"""The largest difference between two logprobs. It is small because the same server runs the same steps."""


def check(record: Record) -> None:
    """Check the memory saver with two ranks on one GPU, over gloo.

    Raises:
        pytest.skip.Exception: SGLang's memory saver is not installed.
        ShiftError, OSError: the server does not start, or does not answer.
    """
    if find_spec("torch_memory_saver") is None:
        pytest.skip("torch_memory_saver is not installed")
    with TemporaryDirectory(prefix="sglang_shift_") as name:
        folder = Path(name)
        flags = [*model_flags(folder), "--attention-backend", "triton", "--tp-size", "2"]
        flags += [*SHARED_GPU_FLAGS, *EAGER, *SHIFT, *SAVER]
        # Each rank holds all layers and half of the other weights. So the two ranks hold at least one model together.
        least = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        variables = one_gpu.environment("gloo", folder / "gloo")
        log = record.folder / "engine-memory-server.log"  # the check itself writes engine-memory.log
        with serving(flags, 0, log, START_SECONDS, variables) as server:
            check_release(record, server, lambda: torch.cuda.mem_get_info(0)[0], least)


def check_release(record: Record, server: Server, free: Callable[[], int], least: int) -> None:
    """Ask in each mode, release the weights, resume, and ask again in each mode.

    Args:
        record: The record for differences and figures.
        server: A server whose memory saver backs up the weights.
        free: Returns the bytes of free memory.
        least: The least number of bytes that the server must free.
    """
    prompts = make_prompts(VOCABULARY)
    before = {}
    for mode in ("tp", "sp"):
        set_threshold(server, THRESHOLDS[mode])
        before[mode] = ask(server, prompts)
    server.flush()  # a busy server releases nothing, and this waits until it is idle
    free_before = free()
    call(server.url + "/release_memory_occupation", body=WEIGHTS, text=True)
    freed = free() - free_before
    call(server.url + "/resume_memory_occupation", body=WEIGHTS, text=True)
    reallocated = free_before + freed - free()
    record.row(freed_bytes=freed, taken_bytes=reallocated, least_bytes=least)
    record.note(
        f"released {freed / 2**20:.0f} MiB and took {reallocated / 2**20:.0f} again; weights are {least / 2**20:.0f}"
    )
    if min(freed, reallocated) < least:
        record.problem(f"{freed} bytes were freed and {reallocated} taken again, less than the weights' {least}")
    for mode in ("tp", "sp"):
        set_threshold(server, THRESHOLDS[mode])
        for problem in compare(ask(server, prompts), before[mode], TOLERANCE).problems:
            record.problem(f"{mode}, after resuming: {problem}")
