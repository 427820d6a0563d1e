"""A server on CPUs whose memory saver does to weights and KV cache what SGLang's does on a GPU.

    python test/memory_saver_server.py --port N --enable-memory-saver [the flags of launch_server]

What is allocated within a region loses its values when its tag is paused, and gets them back when it is resumed
if the region was to have a backup. So what no region has, or no update restores, gives other answers.
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
PER_LAYER = 4  # projections
GARBAGE = 255  # of each byte: not a number
run_rank = scheduler.run_scheduler_process


class Allocations(TorchDispatchMode):
    """Storages that are allocated inside, while they live.

    Attributes:
        live: They, by address of their bookkeeping.
        bytes: Of them, now.
        peak: The most that there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Any] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known | self.live.keys():
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
    """What one region allocated; ``saved`` while it is paused with a backup."""

    tag: str
    backup: bool
    allocations: Allocations
    saved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]]


class CpuMemorySaver(torch_memory_saver_adapter.TorchMemorySaverAdapter):
    """See the module's words; its regions are one process's, as the real saver's are."""

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
        for region in self._tagged(tag):
            for storage in region.allocations.storages():
                if region.backup:
                    region.saved.append((storage, storage.clone()))
                storage.fill_(GARBAGE)

    def resume(self, tag: str) -> None:
        for region in self._tagged(tag):
            for storage, values in region.saved:
                storage.copy_(values)
            region.saved.clear()

    def _tagged(self, tag: str) -> list[Region]:
        return [region for region in self.regions if region.tag == tag]


def facts(base_weights: Any) -> dict[str, int]:
    """What a rank's weights are, in bytes: of which in no region, and the most there was beside the final."""
    loading, assembly = [r.allocations for r in CpuMemorySaver.regions if r.tag == WEIGHTS]
    covered = {s.data_ptr() for r in CpuMemorySaver.regions if r.tag == WEIGHTS for s in r.allocations.storages()}
    tensors = [p.data for p in base_weights.model.parameters()] + [p.base.weight for p in base_weights.projections]
    tensors += [p.base.bias for p in base_weights.projections if p.base.bias is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {
        "total": sum(storages.values()),
        "outside": sum(size for place, size in storages.items() if place not in covered),
        "peak_of_loading": loading.peak - loading.bytes,
        "peak_of_assembly": assembly.peak - assembly.bytes,
        "shard_of_a_layer": sum(p.linear.weight.nbytes for p in base_weights.projections[:PER_LAYER]),
    }


def run_scheduler_process(*args: Any, **kwargs: Any) -> None:
    install()
    torch.cuda.synchronize = lambda device=None: None  # which a release calls, whatever the device
    load_model, state = model_runner.ShiftModelRunner.load_model, scheduler.ShiftScheduler.shift_state
    found: dict[str, int] = {}

    def load_and_look(self: Any) -> None:
        load_model(self)
        found.update(facts(self.base_weights))

    model_runner.ShiftModelRunner.load_model = load_and_look  # type: ignore[method-assign]
    scheduler.ShiftScheduler.shift_state = lambda self: {**state(self), "saver": found}  # type: ignore[method-assign]
    run_rank(*args, **kwargs)


def install() -> None:
    """Every adapter that SGLang makes is ours."""
    torch_memory_saver_adapter.TorchMemorySaverAdapter.create = staticmethod(lambda enable: CpuMemorySaver())  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    refusals.FEATURES = tuple(row for row in refusals.FEATURES if "memory-saver" not in row[0])
    scheduler.run_scheduler_process = run_scheduler_process
    launch_server.main(sys.argv[1:])
