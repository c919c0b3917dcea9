"""Staging buffers in VRAM: one of equal size for each transfer stream, from a stream-ordered pool of the engine's own."""

from __future__ import annotations

import contextlib

from kvortex.devices.cuda import CudaDevice
from kvortex.devices.driver import api, check, current
from kvortex.errors import ConfigError, DeviceError
from kvortex.memory.arena import SLOT_ALIGNMENT


class StagingRing:
    """``count`` staging buffers, contents undefined.

    Parameters
    ----------
    device
    budget
        Bytes for all buffers together; each gets an equal part, rounded down to 4 KiB.
    count
        Number of buffers.

    Attributes
    ----------
    addresses : list of int
        One buffer behind another.
    buffer_bytes : int

    Raises
    ------
    ConfigError
        A buffer would be smaller than 4 KiB.
    DeviceError
        The VRAM cannot be had.
    """

    def __init__(self, device: CudaDevice, budget: int, count: int) -> None:
        self.buffer_bytes = budget // count // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        if not self.buffer_bytes:
            least = count * SLOT_ALIGNMENT
            raise ConfigError(f"gpu_pool_size_bytes = {budget}: {count} staging buffers need at least {least} bytes")
        self._device = device
        self.addresses: list[int] = []
        with current(device.context) as driver:
            properties = driver.CUmemPoolProps()
            properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            properties.location.id = device.ordinal
            self._pool = check(driver.cuMemPoolCreate(properties), "cuMemPoolCreate")
            try:
                what = f"{count} staging buffers of {self.buffer_bytes} bytes (gpu_pool_size_bytes = {budget})"
                nbytes = count * self.buffer_bytes  # in one piece, so that a DMA may reach from one buffer into the next
                first = int(check(driver.cuMemAllocFromPoolAsync(nbytes, self._pool, 0), what))
                self.addresses += [first + at * self.buffer_bytes for at in range(count)]
                check(driver.cuStreamSynchronize(0), "cuStreamSynchronize")
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Gives the VRAM back. Nothing may be in flight. A second call does nothing."""
        if self._pool is None:
            return
        with contextlib.suppress(DeviceError), current(self._device.context):
            if self.addresses:
                api().cuMemFreeAsync(self.addresses[0], 0)
            api().cuStreamSynchronize(0)
            api().cuMemPoolDestroy(self._pool)
        self.addresses.clear()
        self._pool = None
