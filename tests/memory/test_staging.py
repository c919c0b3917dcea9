"""Staging buffers: equal parts of the budget, and given back on every path."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvortex.errors import ConfigError, DeviceError
from kvortex.memory.staging import StagingRing
from tests.fake_driver import FakeDriver, installed

DEVICE = SimpleNamespace(context=77, ordinal=3)


@pytest.mark.parametrize(
    ("budget", "count", "each"),
    [(4096, 1, 4096), (3 * 4096, 3, 4096), (3 * 4096 + 4095, 3, 4096), (1 << 20, 3, 348160), (5 * 8192 - 1, 5, 4096)],
)
def test_equal_parts_of_the_budget(budget: int, count: int, each: int) -> None:
    with installed(FakeDriver()) as driver:
        ring = StagingRing(DEVICE, budget, count)
        assert ring.buffer_bytes == each and each % 4096 == 0 and each * count <= budget
        assert len(ring.addresses) == len(set(ring.addresses)) == count
        names = [name for name, _ in driver.calls]
        last = len(names) - 1 - names[::-1].index("cuMemAllocFromPoolAsync")
        assert "cuStreamSynchronize" in names[last:], "there before anyone uses it on another stream"
        ring.close()


@pytest.mark.parametrize(("budget", "count"), [(1, 1), (4095, 1), (2 * 4096, 3)])
def test_a_budget_that_is_too_small(budget: int, count: int) -> None:
    wanted = f"gpu_pool_size_bytes = {budget}: {count} staging buffers need at least {count * 4096} bytes"
    with installed(FakeDriver()) as driver, pytest.raises(ConfigError, match=wanted):
        StagingRing(DEVICE, budget, count)
    assert not driver.calls


def test_close_gives_everything_back_once() -> None:
    with installed(FakeDriver()) as driver:
        ring = StagingRing(DEVICE, 3 * 4096, 3)
        addresses = list(ring.addresses)
        ring.close()
        ring.close()
        assert [address for address, _ in driver.named("cuMemFreeAsync")] == addresses[:1] and not ring.addresses
        assert len(driver.named("cuMemPoolDestroy")) == 1
        assert len(driver.named("cuCtxPushCurrent")) == len(driver.named("cuCtxPopCurrent"))


@pytest.mark.parametrize(
    ("function", "spare", "freed"),
    [
        ("cuMemAllocFromPoolAsync", 0, 0),
        ("cuStreamSynchronize", 0, 1),
    ],
)
def test_a_refusal_gives_back_what_was_had(function: str, spare: int, freed: int) -> None:
    with installed(FakeDriver()) as driver:
        driver.fails[function] = (2, spare)
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            StagingRing(DEVICE, 3 * 4096, 3)
        assert len(driver.named("cuMemFreeAsync")) == freed and len(driver.named("cuMemPoolDestroy")) == 1
        assert len(driver.named("cuCtxPushCurrent")) == len(driver.named("cuCtxPopCurrent"))


def test_a_refusal_names_the_option() -> None:
    with installed(FakeDriver()) as driver:
        driver.fails["cuMemAllocFromPoolAsync"] = (2, 0)
        with pytest.raises(DeviceError, match=r"3 staging buffers of 4096 bytes \(gpu_pool_size_bytes = 12288\)"):
            StagingRing(DEVICE, 3 * 4096, 3)


def test_no_pool_at_all() -> None:
    with installed(FakeDriver()) as driver:
        driver.fails["cuMemPoolCreate"] = (2, 0)
        with pytest.raises(DeviceError, match="cuMemPoolCreate"):
            StagingRing(DEVICE, 3 * 4096, 3)
        assert len(driver.named("cuCtxPushCurrent")) == len(driver.named("cuCtxPopCurrent"))


@pytest.mark.gpu
def test_real_buffers_lie_one_behind_another() -> None:
    from kvortex.devices import driver as cu
    from kvortex.devices.cuda import CudaDevice

    ring = StagingRing(CudaDevice(), 3 * 65536 + 100, 3)
    assert ring.buffer_bytes == 65536
    first, second, third = ring.addresses
    assert (second - first, third - second) == (65536, 65536)
    with cu.current(CudaDevice().context) as driver:
        for address in ring.addresses:
            cu.check(driver.cuMemsetD8(address, 7, 65536), "cuMemsetD8")
    ring.close()
