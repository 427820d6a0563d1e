"""``python -m sglang_shift.tools.benchmark.linked_server`` starts a server whose ranks are joined by an emulated link.

For SGLang all ranks are one node: one launcher starts them. Each rank's process enters the network namespace of its
rank, so that ranks reach each other over the link only. :func:`sglang_shift.tools.benchmark.link.start_as_one_node`
starts this command.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from sglang_shift.errors import ShiftError
from sglang_shift.tools.benchmark.link import NAMESPACES_VARIABLE, address_of

FOLDER = "/run/netns"
"""Where iproute2 keeps the namespaces by their names."""
CLONE_NEWNET = 0x40000000
"""The kind of namespace, as the kernel's header sched.h names it."""


def enter(namespace: str) -> None:
    """Bring the calling thread, and all threads that it starts later, into a network namespace.

    Raises:
        ShiftError: the namespace does not exist, or this process may not enter it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    path = f"{FOLDER}/{namespace}"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShiftError(f"the network namespace {path} cannot be opened: {error.strerror}") from error
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            reason = os.strerror(ctypes.get_errno())
            raise ShiftError(f"the network namespace {path} cannot be entered: {reason}; the emulated link needs root")
    finally:
        os.close(descriptor)


def run_rank(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, *args: Any) -> None:
    """Run a rank in the namespace of its rank."""
    enter(os.environ[NAMESPACES_VARIABLE].split(",")[tp_rank])
    os.environ["SGLANG_HOST_IP"] = address_of(tp_rank)
    from sglang_shift.runtime.scheduler import run_scheduler_process

    run_scheduler_process(server_args, port_args, gpu_id, tp_rank, *args)


if __name__ == "__main__":
    from sglang_shift.launch_server import main

    main(sys.argv[1:], "python -m sglang_shift.tools.benchmark.linked_server", run_rank)
