"""Pages of a GPU's memory, on SGLang's classes for CUDA's virtual memory.

Nothing of this has run on a GPU. Instances are refused there, so no server uses this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.utils import cuda_vmm_utils as vmm

from sglang_shift.memory.pages import PAGE_BYTES, Device, Reservation
from sglang_shift.seams import relies_on


class CudaDevice(Device):
    """Pages of a GPU. A page is a handle of CUDA's: a handle is mapped as a whole.

    Args:
        device_id: The number of the GPU.
        page_bytes: The size of a page, rounded up to what the GPU can map.
    """

    def __init__(self, device_id: int, page_bytes: int = PAGE_BYTES) -> None:
        self.device_id, self.prop = device_id, vmm.make_device_allocation_prop(device_id, handle_types=None)
        super().__init__(vmm.align_up(page_bytes, vmm.get_allocation_granularity(self.prop)))
        self._driver = vmm._get_cuda_driver()

    def reserve(self, nbytes: int) -> Reservation:
        return CudaReservation(self, nbytes)

    def _create(self) -> int:
        try:
            return int(vmm.check_drv(self._driver.cuMemCreate(self.page_bytes, self.prop, 0), "cuMemCreate"))
        except RuntimeError as error:
            raise MemoryError(f"the GPU has no memory for a page of {self.page_bytes} bytes: {error}") from None

    def _destroy(self, page: int) -> None:
        vmm.check_drv(self._driver.cuMemRelease(page), "cuMemRelease")


class CudaReservation(Reservation):
    """Addresses of a GPU."""

    device: CudaDevice

    def __init__(self, device: CudaDevice, nbytes: int) -> None:
        super().__init__(device, nbytes)
        size = device.page_bytes
        self._range = vmm.VmmReservation(self.count * size, device.prop, device.device_id, alignment=size)
        self.address = self._range.base

    def unmap(self, places: Any) -> None:
        torch.cuda.synchronize(self.device.device_id)  # no kernel may use the pages any more
        super().unmap(places)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._range.size:
            raise ValueError(f"a tensor of shape {tuple(shape)} is larger than a range of {self.count} pages")
        return vmm.tensor_from_pointer(self.address, nbytes, shape=shape, dtype=dtype, device_id=self.device.device_id)

    def _map(self, place: int, page: int) -> None:
        self._range.map_existing(place * self.device.page_bytes, self.device.page_bytes, page)

    @relies_on(
        "sglang.srt.utils.cuda_vmm_utils:VmmReservation.map_existing",
        "This method notes each mapping, and has no counterpart that removes a single one.",
    )
    def _unmap(self, place: int) -> None:
        size = self.device.page_bytes
        address = self.address + place * size
        vmm.check_drv(self.device._driver.cuMemUnmap(address, size), "cuMemUnmap")
        self._range._mappings.remove((address, size, None))
