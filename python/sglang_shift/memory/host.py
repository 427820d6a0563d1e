"""Pages of the host's memory, for ranks on a CPU: pages of a file in memory, mapped by the operating system."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PAGESIZE, PROT_READ, PROT_WRITE

import torch

from sglang_shift.memory.pages import PAGE_BYTES, Device, Reservation

PROT_NONE, MAP_FIXED = 0x0, 0x10  # Python's mmap module does not name them
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 0x1, 0x2
FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class HostDevice(Device):
    """Pages of the host. A page is the number of a piece of a file that has no name and lies in memory.

    Args:
        page_bytes: The size of a page, a multiple of the system's.
        limit: The most pages; None for as many as the system has.
    """

    def __init__(self, page_bytes: int = PAGE_BYTES, limit: int | None = None) -> None:
        super().__init__(page_bytes)
        if page_bytes % PAGESIZE:
            raise ValueError(f"a page of {page_bytes} bytes is no multiple of the system's {PAGESIZE} bytes")
        self.limit = limit
        self.file = os.memfd_create("sglang_shift")
        self._end = 0
        self._holes: list[int] = []

    @property
    def resident_bytes(self) -> int:
        """The memory that all pages take, as the operating system counts it."""
        return os.fstat(self.file).st_blocks * 512

    def reserve(self, nbytes: int) -> Reservation:
        return HostReservation(self, nbytes)

    def _create(self) -> int:
        page = self._holes[-1] if self._holes else self._end
        if self.limit is not None and page >= self.limit:
            raise MemoryError(f"the device has {self.limit} pages of {self.page_bytes} bytes, and all are taken")
        try:  # without this the first touch of a page would end the process if there is no memory
            os.posix_fallocate(self.file, page * self.page_bytes, self.page_bytes)
        except OSError as error:
            raise MemoryError(f"the system has no memory for a page of {self.page_bytes} bytes: {error}") from None
        if self._holes:
            self._holes.pop()
        else:
            self._end += 1
        return page

    def _destroy(self, page: int) -> None:
        flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self.file, flags, page * self.page_bytes, self.page_bytes):
            raise OSError(ctypes.get_errno(), "a page cannot be given back to the system")
        self._holes.append(page)


class HostReservation(Reservation):
    """Addresses of this process. Without a page, they cannot be read or written."""

    device: HostDevice

    def __init__(self, device: HostDevice, nbytes: int) -> None:
        super().__init__(device, nbytes)
        size = device.page_bytes
        begin = self._mmap(None, (self.count + 1) * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS)
        self.address = -(-begin // size) * size

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        elements = math.prod(shape)
        if elements * dtype.itemsize > self.count * self.device.page_bytes:
            raise ValueError(f"a tensor of shape {tuple(shape)} is larger than a range of {self.count} pages")
        memory = (ctypes.c_byte * (elements * dtype.itemsize)).from_address(self.address)
        return torch.frombuffer(memory, dtype=dtype, count=elements).view(*shape)

    def _map(self, place: int, page: int) -> None:
        size = self.device.page_bytes
        flags, protection = MAP_SHARED | MAP_FIXED, PROT_READ | PROT_WRITE
        self._mmap(self.address + place * size, size, protection, flags, self.device.file, page * size)

    def _unmap(self, place: int) -> None:
        size = self.device.page_bytes
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
        self._mmap(self.address + place * size, size, PROT_NONE, flags)

    @staticmethod
    def _mmap(address: int | None, size: int, protection: int, flags: int, file: int = -1, offset: int = 0) -> int:
        begin: int | None = _libc.mmap(address, size, protection, flags, file, offset)
        if begin is None or begin == FAILED:
            raise OSError(ctypes.get_errno(), f"{size} bytes of addresses cannot be mapped")
        return begin
