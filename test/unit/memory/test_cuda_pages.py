"""Pages of a GPU, on a driver that only notes the calls. No GPU has run this code."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from sglang.srt.utils import cuda_vmm_utils
from sglang_shift.memory.cuda import CudaDevice

PAGE = 2 << 20
BASE = 64 * PAGE


@pytest.fixture
def driver(monkeypatch):
    driver = mock.MagicMock()
    driver.CUresult.CUDA_SUCCESS = done = 0
    for name in ("cuMemMap", "cuMemUnmap", "cuMemSetAccess", "cuMemRelease"):
        getattr(driver, name).return_value = (done,)
    driver.cuMemCreate.side_effect = [(done, handle) for handle in (101, 102, 103)] + [("out of memory", None)]
    driver.cuMemAddressReserve.return_value = (done, BASE)
    driver.cuMemGetAllocationGranularity.return_value = (done, PAGE)
    monkeypatch.setattr(cuda_vmm_utils, "_drv", driver)
    monkeypatch.setattr(torch.cuda, "synchronize", driver.synchronize)
    return driver


def test_single_pages_are_unmapped_and_mapped_elsewhere(driver):
    device = CudaDevice(0)
    device.take(3)
    places = device.reserve(3 * PAGE - 5)
    assert (places.address, places.count) == (BASE, 3)
    places.map([0, 2])
    calls = [call.args[:4] for call in driver.cuMemMap.mock_calls]
    assert calls == [(BASE, PAGE, 0, 101), (BASE + 2 * PAGE, PAGE, 0, 102)]
    driver.reset_mock()
    places.unmap([2])
    assert [name for name, *_ in driver.mock_calls] == ["synchronize", "cuMemUnmap"], "first no kernel may use the page"
    assert driver.cuMemUnmap.call_args.args == (BASE + 2 * PAGE, PAGE)
    places.map([2])
    assert driver.cuMemMap.call_args.args[3] == 102
    places.unmap([0, 2])
    device.give_back(1)
    driver.cuMemRelease.assert_called_once_with(102)


def test_a_gpu_without_memory(driver):
    device = CudaDevice(0)
    with pytest.raises(MemoryError, match="the GPU has no memory for a page of 2097152 bytes"):
        device.take(4)
    assert device.count == 0 and driver.cuMemRelease.call_count == 3
