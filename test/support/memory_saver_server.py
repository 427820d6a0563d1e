"""Runs a server on CPUs. Its memory saver treats weights and KV cache as SGLang's memory saver does on a GPU.

    python test/support/memory_saver_server.py --port N --enable-memory-saver [the flags of launch_server]

A tensor that is allocated within a region loses its values when the region's tag is paused. It gets them back when the
tag is resumed, if the region has a backup. If neither a backup nor an update restores a tensor, the answers change.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.utils import torch_memory_saver_adapter
from sglang_shift import launch_server
from sglang_shift.args import refusals
from sglang_shift.runtime import model_runner, scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS = "weights"
GARBAGE = 255  # a float whose bytes all have this value is not a number
run_rank = scheduler.run_scheduler_process


class Allocations(TorchDispatchMode):
    """The storages that are allocated inside a ``with`` block, while they live.

    Attributes:
        live: References to the live storages, by the address of their bookkeeping.
        bytes: Bytes of all live storages.
        peak: The most bytes at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs | self.live.keys():
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_: Any) -> None:
            del self.live[key]
            self.bytes -= size

        self.live[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def storages(self) -> list[torch.UntypedStorage]:
        return [storage for reference in list(self.live.values()) if (storage := reference()) is not None]


@dataclass
class Region:
    """The allocations of one region. ``saved`` holds their values while the region is paused with a backup."""

    tag: str
    backup: bool
    allocations: Allocations
    saved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]


class CpuMemorySaver(torch_memory_saver_adapter.TorchMemorySaverAdapter):
    """The memory saver that the module describes. Its regions belong to one process, as in the real memory saver."""

    regions: ClassVar[list[Region]] = []
    enabled = True

    def configure_subprocess(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        region = Region(tag, enable_cpu_backup, Allocations(), [])
        self.regions.append(region)
        with region.allocations:
            yield

    def pause(self, tag: str) -> None:
        for region in self._regions_of(tag):
            for storage in region.allocations.storages():
                if region.backup:
                    region.saved.append((storage, storage.clone()))
                storage.fill_(GARBAGE)

    def resume(self, tag: str) -> None:
        for region in self._regions_of(tag):
            for storage, values in region.saved:
                storage.copy_(values)
            region.saved.clear()

    def _regions_of(self, tag: str) -> list[Region]:
        return [region for region in self.regions if region.tag == tag]


def facts(base_weights: Any) -> dict[str, int]:
    """Return bytes of a rank's weights: the total, the part in no region, and the peaks beyond the final size."""
    loading, assembly = [r.allocations for r in CpuMemorySaver.regions if r.tag == WEIGHTS]
    addresses = {s.data_ptr() for r in CpuMemorySaver.regions if r.tag == WEIGHTS for s in r.allocations.storages()}
    modules: Any = base_weights.model.named_modules()
    tensors = [p.data for p in base_weights.model.parameters()]
    tensors += [tensor for base in base_weights.bases.values() for tensor in base.tensors()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "total": sum(storages.values()),
        "outside": sum(size for place, size in storages.items() if place not in addresses),
        "peak_of_loading": loading.peak - loading.bytes,
        "peak_of_assembly": assembly.peak - assembly.bytes,
        "shard_of_a_layer": sum(
            m.weight.nbytes for name, m in modules if ".layers.0." in name and m in base_weights.bases
        ),
    }


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    install()
    torch.cuda.synchronize = lambda device=None: None  # a release calls this on every device
    load_model, state = model_runner.ShiftModelRunner.load_model, scheduler.ShiftScheduler.shift_state
    sizes: dict[str, int] = {}

    def load_and_look(self: Any) -> None:
        load_model(self)
        sizes.update(facts(self.base_weights))

    model_runner.ShiftModelRunner.load_model = load_and_look  # type: ignore[method-assign]
    scheduler.ShiftScheduler.shift_state = lambda self: {**state(self), "saver": sizes}  # type: ignore[method-assign]
    run_rank(*args, **kwargs)


def install() -> None:
    """Let SGLang make only adapters of our class."""
    torch_memory_saver_adapter.TorchMemorySaverAdapter.create = staticmethod(lambda enable: CpuMemorySaver())  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    refusals.FEATURES = tuple(row for row in refusals.FEATURES if "memory-saver" not in row[0])
    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
