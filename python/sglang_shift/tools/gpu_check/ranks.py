"""Runs one process for each rank of a group, without SGLang."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankGroup:
    """The parts of SGLang's ``GroupCoordinator`` that the exchange needs, over PyTorch's default group."""

    def __init__(self) -> None:
        self.world_size, self.rank_in_group = dist.get_world_size(), dist.get_rank()
        self.device_group = dist.group.WORLD

    def all_to_all_single(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Send block i of ``input`` to rank i, and receive block j of ``output`` from rank j.

        This is PyTorch's operation in CUDA graphs, too. A server uses PyNccl's operation there.
        """
        dist.all_to_all_single(output, input)


def run_ranks(function: Callable[..., Any], devices: list[str], backend: str, *args: Any) -> Any:
    """Run ``function(device, *args)`` on every rank of a new group.

    Args:
        function: A function at the top level of a module, so that the processes can import it.
        devices: The devices of the ranks, in order.
        backend: The backend of the group.
        args: Further arguments, which are the same for all ranks.

    Returns:
        The value that rank 0 returned. It must be a JSON value.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised an exception.
    """
    with TemporaryDirectory(prefix="sglang_shift_") as folder:
        arguments = devices, backend, folder, function, args
        mp.start_processes(_main, arguments, len(devices), daemon=True, start_method="spawn")
        return json.loads(Path(folder, "result").read_text())


def _main(
    rank: int, devices: list[str], backend: str, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=len(devices))
    result = function(device, *args)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    # This must not run after an exception. The traceback keeps CUDA graphs alive, and NCCL would wait for them.
    dist.destroy_process_group()
