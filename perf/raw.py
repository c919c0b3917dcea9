"""The floor: one contiguous copy over the link, timed by the device."""

from __future__ import annotations

import ctypes
import time

from kvortex.devices import Device
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.memory.arena import PinnedArena


class RawCopy:
    """One DMA between a contiguous VRAM buffer and a pinned one (on the host device, one ``memcpy``).

    Parameters
    ----------
    device
    nbytes
        Bytes of both buffers.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.nbytes = device, nbytes
        self._arena = PinnedArena(device, nbytes + 4095, nbytes)
        self._buffer = device.allocate(nbytes)
        if isinstance(device, CudaDevice):
            with cu.current(device.context) as driver:
                self._stream = cu.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
                self._events = [cu.check(driver.cuEventCreate(0), "cuEventCreate") for _ in range(2)]

    def seconds(self, *, to_host: bool) -> float:
        """Time of one copy."""
        host, there = self._arena.address, self._buffer.address
        if not isinstance(self._device, CudaDevice):
            began = time.perf_counter()
            ctypes.memmove(*((host, there) if to_host else (there, host)), self.nbytes)
            return time.perf_counter() - began
        with cu.current(self._device.context) as driver:
            first, last = self._events
            cu.check(driver.cuEventRecord(first, self._stream), "cuEventRecord")
            if to_host:
                cu.check(driver.cuMemcpyDtoHAsync(host, there, self.nbytes, self._stream), "cuMemcpyDtoHAsync")
            else:
                cu.check(driver.cuMemcpyHtoDAsync(there, host, self.nbytes, self._stream), "cuMemcpyHtoDAsync")
            cu.check(driver.cuEventRecord(last, self._stream), "cuEventRecord")
            cu.check(driver.cuEventSynchronize(last), "cuEventSynchronize")
            return float(cu.check(driver.cuEventElapsedTime(first, last), "cuEventElapsedTime")) * 1e-3

    def close(self) -> None:
        """Frees the memory, stream and events."""
        if isinstance(self._device, CudaDevice):
            with cu.current(self._device.context) as driver:
                cu.check(driver.cuStreamDestroy(self._stream), "cuStreamDestroy")
                for event in self._events:
                    cu.check(driver.cuEventDestroy(event), "cuEventDestroy")
        self._arena.close()
        self._buffer.free()
