"""A server of the tests whose ranks are forked, with SGLang imported, instead of spawned.

    python test/forked_server.py {-m MODULE | FILE} [the flags of launch_server]

Importing SGLang takes a process 13 s of a core, and each rank would do it again: on two cores a server of eight ranks
needs 84 s to start, forked 33. The program, its flags and the ranks' code are the same; servers that the tests start
without this (test_failures, test_calibrated_server, test_small_pool and others) are the user's command to the letter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from typing import Any

# Spawned ranks read their share of the cores from the environment; forked ones have torch's threads already.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def fork_ranks() -> None:
    """SGLang sets the start method to "spawn" as it launches: take "fork" for it."""
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    set_start_method = multiprocessing.set_start_method

    def set_to_fork(method: str | None, force: bool = False) -> Any:
        return set_start_method("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = set_to_fork


if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    fork_ranks()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
