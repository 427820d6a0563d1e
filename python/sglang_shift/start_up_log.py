"""Leave messages out of the start-up log.

SGLang's processes log many messages at start-up that a user can do nothing about, and each rank repeats them. This
module lists all messages that are left out, by their module and their first words. One rank of each node logs all other
messages. The other ranks leave out messages below the level of a warning while the server starts.

With ``--log-level debug`` or a ``SGLANG_LOGGING_CONFIG_PATH``, the log has every message. With
``PYTHONWARNINGS=default``, it has every warning of Python.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator

# Each mapping has a module of SGLang, which is also the name of its logger, and the beginning of its message.

# These are Python warnings of modules that every process imports for any model. They say that a CPU is not a GPU.
CPU_WARNINGS = {
    "sglang.srt.layers.quantization.awq.awq": "Only CUDA, HIP and XPU support AWQ currently.",
    "sglang.srt.layers.quantization.gguf": "Only CUDA, MUSA and NPU support GGUF quantization currently.",
    "sglang.kernels.ops.attention.fla.utils": "Triton is not supported on current platform, roll back to CPU.",
}
# Our CPU platform itself (`platforms/cpu.py`) is the reason for these log messages.
CPU_MESSAGES = {
    # There is no CUDA device.
    "sglang.kernels.jit.utils.arch": "Cannot detect CUDA architecture.",
    "sglang.srt.distributed.device_communicators.triton_symm_mem_ag": "multimem all-gather disabled (",
    # The platform uses the collectives of gloo, and it divides the cores among the ranks itself.
    "sglang.srt.distributed.bootstrap": "init_cpu_threads_env and shared memory based AllReduce is disabled",
    # This message asks for --max-total-tokens, which the platform always sets.
    "sglang.srt.utils.numa_utils": "The total number of ranks (",
}
# SGLang logs its several hundred arguments in 19,000 characters. `/server_info` has them, too.
LAUNCHER_MESSAGES = {"sglang.srt.entrypoints.engine": "server_args="}
# SGLang cannot import these models on a CPU, and Shift Parallelism refuses them anyway.
NOT_ON_CPU = ("falcon_mamba", "mamba")
# The start-up messages of these loggers are the same on all ranks.
SAME_ON_ALL_RANKS = ("sglang",)


class LeaveOut(logging.Filter):
    """Drops the messages that begin with ``beginning``, unless the user wants to see everything."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return shows_everything() or not record.getMessage().startswith(self.beginning)


def shows_everything() -> bool:
    """Whether the user asked for the whole log, or configured the log."""
    return logging.getLogger().isEnabledFor(logging.DEBUG) or "SGLANG_LOGGING_CONFIG_PATH" in os.environ


def leave_out(messages: dict[str, str]) -> None:
    """Leave these messages out of this process's log."""
    for name, beginning in messages.items():
        if not any(isinstance(known, LeaveOut) for known in logging.getLogger(name).filters):
            logging.getLogger(name).addFilter(LeaveOut(beginning))


def leave_out_cpu() -> None:
    """Leave out SGLang's messages that a CPU is not a GPU, in this process and in processes that start later."""
    leave_out(CPU_MESSAGES)
    options = []
    for module, beginning in CPU_WARNINGS.items():
        # The filter is appended, so the user's filters come first.
        warnings.filterwarnings("ignore", re.escape(beginning), UserWarning, re.escape(module), append=True)
        # An option ends at the first comma.
        options.append(f"ignore:{beginning.split(',')[0]}:UserWarning:{module}")
    given = os.environ.get("PYTHONWARNINGS", "")
    if options[0] not in given:
        # If several options match, the last one counts.
        os.environ["PYTHONWARNINGS"] = ",".join([*options, *filter(None, [given])])


@contextlib.contextmanager
def quiet_other_ranks(logs: bool) -> Iterator[None]:
    """Inside of this context, the loggers of :data:`SAME_ON_ALL_RANKS` only log warnings and errors.

    Args:
        logs: Whether this rank logs for its node. Its loggers stay as they are.
    """
    loggers = [] if logs or shows_everything() else [logging.getLogger(name) for name in SAME_ON_ALL_RANKS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
