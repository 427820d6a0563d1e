"""What the start-up log leaves out, and why.

SGLang's processes log much at start-up that no user can act on, and each rank logs it again. Nothing is left out but
what this module lists: a message by its module and its first words, or the messages of other ranks below the level of
a warning. At ``--log-level debug``, and with a ``SGLANG_LOGGING_CONFIG_PATH``, no message is left out;
with ``PYTHONWARNINGS=default``, no warning of Python.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator

# In each mapping, a module of SGLang, which is also the name of its logger, and what its message begins with.

# Python warnings of modules that every process imports, whatever the model: they say that a CPU is not a GPU.
CPU_WARNINGS = {
    "sglang.srt.layers.quantization.awq.awq": "Only CUDA, HIP and XPU support AWQ currently.",
    "sglang.srt.layers.quantization.gguf": "Only CUDA, MUSA and NPU support GGUF quantization currently.",
    "sglang.kernels.ops.attention.fla.utils": "Triton is not supported on current platform, roll back to CPU.",
}
# Log messages whose reason is our CPU platform itself (`platforms/cpu.py`).
CPU_MESSAGES = {
    # There is no CUDA device to look at.
    "sglang.kernels.jit.utils.arch": "Cannot detect CUDA architecture.",
    "sglang.srt.distributed.device_communicators.triton_symm_mem_ag": "multimem all-gather disabled (",
    # The platform's collectives are those of gloo, and it divides the cores among the ranks itself.
    "sglang.srt.distributed.bootstrap": "init_cpu_threads_env and shared memory based AllReduce is disabled",
    # It asks for --max-total-tokens, which the platform always sets.
    "sglang.srt.utils.numa_utils": "The total number of ranks (",
}
# SGLang's dump of its several hundred arguments, 19,000 characters; `/server_info` has the same.
LAUNCHER_MESSAGES = {"sglang.srt.entrypoints.engine": "server_args="}
# Models that cannot be imported on a CPU, and that Shift Parallelism refuses anyway.
NOT_ON_CPU = ("falcon_mamba", "mamba")
# Loggers whose start-up messages are the same on all ranks.
SAME_ON_ALL_RANKS = ("sglang", "sglang_shift.parallel.exchange")


class LeaveOut(logging.Filter):
    """Drops the messages that begin with ``beginning``, unless the user wants to see everything."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return shows_everything() or not record.getMessage().startswith(self.beginning)


def shows_everything() -> bool:
    """Whether the user asked for the whole log, or configured it."""
    return logging.getLogger().isEnabledFor(logging.DEBUG) or "SGLANG_LOGGING_CONFIG_PATH" in os.environ


def leave_out(messages: dict[str, str]) -> None:
    """Leave these messages out of this process's log."""
    for name, beginning in messages.items():
        if not any(isinstance(known, LeaveOut) for known in logging.getLogger(name).filters):
            logging.getLogger(name).addFilter(LeaveOut(beginning))


def leave_out_cpu() -> None:
    """Leave out what SGLang says of a CPU for not being a GPU, here and in the processes started later."""
    leave_out(CPU_MESSAGES)
    options = []
    for module, beginning in CPU_WARNINGS.items():
        # Appended, so that filters of the user's come first.
        warnings.filterwarnings("ignore", re.escape(beginning), UserWarning, re.escape(module), append=True)
        # An option ends at the first comma.
        options.append(f"ignore:{beginning.split(',')[0]}:UserWarning:{module}")
    given = os.environ.get("PYTHONWARNINGS", "")
    if options[0] not in given:
        # The last option that matches is the one that counts.
        os.environ["PYTHONWARNINGS"] = ",".join([*options, *filter(None, [given])])


@contextlib.contextmanager
def one_rank_speaks(speaks: bool) -> Iterator[None]:
    """Within it, a rank that does not speak logs only warnings and errors of :data:`SAME_ON_ALL_RANKS`."""
    loggers = [] if speaks or shows_everything() else [logging.getLogger(name) for name in SAME_ON_ALL_RANKS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
