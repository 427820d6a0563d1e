"""Pages of the host: addresses stay, bytes move, and an address without a page cannot be touched."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal

import pytest
import torch
from sglang_shift.memory.host import HostDevice
from sglang_shift.memory.pages import PAGE_BYTES

SMALL = 4096


def shared_memory() -> int:
    """Bytes of shared memory that this process has touched and that are still mapped."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssShmem"].split()[0]) << 10


def signal_of(touch) -> int:
    """The signal that ends a process that touches memory; 0 if it ends by itself."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        touch()
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_memory_moves_from_one_tensor_to_another():
    device = HostDevice()
    assert device.page_bytes == PAGE_BYTES == 2 << 20
    device.take(8)
    weights, cache = device.reserve(6 * PAGE_BYTES), device.reserve(6 * PAGE_BYTES)
    weights.map(range(6))
    cache.map(range(2))
    elements = 6 * PAGE_BYTES // 4
    first, second = (each.tensor((elements,), torch.float32) for each in (weights, cache))
    addresses = first.data_ptr(), second.data_ptr()
    assert addresses == (weights.address, cache.address) and weights.address % PAGE_BYTES == 0
    first.copy_(torch.arange(elements))
    second[: elements // 3] = 7
    before, resident = shared_memory(), device.resident_bytes
    assert resident == 8 * PAGE_BYTES

    weights.unmap([1, 2, 4])
    assert len(device.stock) == 3
    cache.map([2, 3, 4])
    second[elements // 3 : 5 * elements // 6] = 8
    assert device.stock == [] and device.count == 8 and device.resident_bytes == resident
    assert abs(shared_memory() - before) < PAGE_BYTES, "the same pages are mapped, in other places"
    page = elements // 6
    for kept in (0, 3, 5):
        assert torch.equal(first[kept * page : (kept + 1) * page], torch.arange(kept * page, (kept + 1) * page).float())
    assert (second[: 2 * page] == 7).all() and (second[2 * page : 5 * page] == 8).all()
    assert signal_of(first[page].item) == signal.SIGSEGV
    assert signal_of(second[5 * page].item) == signal.SIGSEGV
    assert signal_of(first[0].item) == 0

    cache.unmap([4, 3, 2])
    weights.map([1, 2, 4])
    first.fill_(1)  # what is mapped counts once it is touched
    assert (first.data_ptr(), second.data_ptr()) == addresses
    assert device.resident_bytes == resident and abs(shared_memory() - before) < PAGE_BYTES


def test_a_page_keeps_its_bytes_while_it_is_mapped_nowhere():
    device = HostDevice(SMALL)
    device.take(1)
    place, other = device.reserve(SMALL), device.reserve(SMALL)
    place.map([0])
    place.tensor((SMALL,), torch.uint8)[:] = 5
    place.unmap([0])
    other.map([0])
    assert (other.tensor((SMALL,), torch.uint8) == 5).all()


def test_no_page_is_lost_if_there_are_too_few():
    device = HostDevice(SMALL, limit=4)
    with pytest.raises(MemoryError, match="has 4 pages of 4096 bytes, and all are taken"):
        device.take(5)
    assert device.count == 0 and device.stock == [] and device.resident_bytes == 0
    device.take(4)
    ranges = device.reserve(3 * SMALL), device.reserve(3 * SMALL)
    ranges[0].map(range(3))
    ranges[0].tensor((3 * SMALL,), torch.uint8)[:] = 9
    with pytest.raises(MemoryError, match="2 pages are needed, and 1 pages are mapped nowhere"):
        ranges[1].map(range(2))
    with pytest.raises(MemoryError, match="2 pages are needed"):
        device.give_back(2)
    assert not ranges[1].mapped and len(device.stock) == 1 and device.count == 4
    assert (ranges[0].tensor((3 * SMALL,), torch.uint8) == 9).all()


def test_the_system_may_have_no_memory(monkeypatch):
    device = HostDevice(SMALL)
    device.take(2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryError, match=r"the system has no memory for a page of 4096 bytes: .*No space left"):
        device.take(1)
    assert device.count == 2
    monkeypatch.undo()
    device.take(1)
    assert device.count == 3 and len(set(device.stock)) == 3


def test_pages_go_back_to_the_system():
    device = HostDevice(SMALL, limit=3)
    device.take(3)
    device.give_back(2)
    assert device.count == 1 and device.resident_bytes == SMALL
    device.take(2)
    assert device.count == 3 and sorted(device.stock) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.map([2, 0]), "place 0 of a range of 3 pages is outside of it, or has a page already"),
        (lambda r: r.map([3]), "place 3 of a range of 3 pages is outside of it, or has a page already"),
        (lambda r: r.map([-1]), "place -1 of a range"),
        (lambda r: r.unmap([0, 1]), "place 1 of a range of 3 pages is outside of it, or has no page"),
        (lambda r: r.tensor((3 * SMALL + 1,), torch.uint8), "is larger than a range of 3 pages"),
    ],
)
def test_wrong_places_change_nothing(change, message):
    device = HostDevice(SMALL)
    device.take(2)
    places = device.reserve(2 * SMALL + 1)
    places.map([0])
    with pytest.raises(ValueError, match=message):
        change(places)
    assert list(places.mapped) == [0] and len(device.stock) == 1


def test_a_page_is_a_multiple_of_the_system_page():
    with pytest.raises(ValueError, match="a page of 5000 bytes is no multiple"):
        HostDevice(5000)
