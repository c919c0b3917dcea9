"""A computation that keeps a GPU busy while transfers beside it are measured, and when these end by its clock."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, TransferTimeoutError
from kvortex.kernels import build
from kvortex.transfer.executor import Completion, poll

KERNEL_S = 0.5e-3  # of one kernel: transfers of a few milliseconds meet many of them
THREADS = 512  # of kvortex.kernels.compute, which needs numba.cuda to import
TILES_A_CTA = 16  # about as many as products of large matrices have
_COUNTERS = 1024
_TRIAL_TURNS = 4096
_LONGEST_WAIT_S = 60.0


class Load:
    """Kernels one behind another on a stream of default priority, and events between them and behind transfers.

    Parameters
    ----------
    device
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream: int | None = None
        self._witness: int | None = None  # a stream that waits for transfers, so that events behind them tell when they end
        self._module: Any = None
        self._events: list[int] = []
        self._counters = device.allocate(4 * _COUNTERS)
        self._used = 0
        try:
            self._open(build.load("compute", device.compute_capability))
            self.reset()
            began = self.queue(1)
            self.queue(2, _TRIAL_TURNS)
            ended = self.queue(0)
            self._turns = max(1, round(_TRIAL_TURNS * KERNEL_S / max(1e-7, self.seconds(began, ended) / 2)))
        except BaseException:
            self.close()
            raise

    def _open(self, cubin: build.Cubin) -> None:
        self._turns = 1
        with cu.current(self._device.context) as driver:
            attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR
            fit = max(1, self._device.attribute(attribute) // THREADS)
            self._ctas = self._device.multiprocessors * fit
            self._module = cu.check(driver.cuModuleLoadData(cubin.code), "cuModuleLoadData of compute")
            self._kernel = cu.check(driver.cuModuleGetFunction(self._module, cubin.entry.encode()), "cuModuleGetFunction")
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = int(cu.check(driver.cuStreamCreate(flags), "cuStreamCreate"))
            self._witness = int(cu.check(driver.cuStreamCreate(flags), "cuStreamCreate"))
        self._values = np.array([0, TILES_A_CTA * self._ctas, 0], np.int64)
        self._pointers = self._values.ctypes.data + 8 * np.arange(3, dtype=np.int64)

    def reset(self) -> None:
        """Makes room for kernels and events, behind all that were queued before."""
        for event in range(len(self._events)):
            self.wait(event)
        with cu.current(self._device.context) as driver:
            while self._events:
                cu.check(driver.cuEventDestroy(self._events.pop()), "cuEventDestroy")
            cu.check(driver.cuMemsetD8Async(self._counters.address, 0, 4 * _COUNTERS, self._stream), "cuMemsetD8Async")
        self._used = 0

    def queue(self, kernels: int, turns: int | None = None) -> int:
        """Puts kernels on the stream and an event behind them, whose number it gives. At most 1024 between resets."""
        self._values[2] = self._turns if turns is None else turns
        with cu.current(self._device.context) as driver:
            for _ in range(kernels):
                self._values[0] = self._counters.address + 4 * self._used
                self._used += 1
                shape = (self._ctas, 1, 1, THREADS, 1, 1, 0)
                launched = driver.cuLaunchKernel(self._kernel, *shape, self._stream, int(self._pointers.ctypes.data), 0)
                cu.check(launched[:1], "cuLaunchKernel of compute")
        return self._record(self._stream)

    def behind(self, transfer: Completion) -> int:
        """Puts an event behind a transfer, when all of it is issued, and gives its number.

        The host notices late that a transfer has ended, and two of them together: its calls wait for one another, among them
        those of a thread that issues the next transfer and finds the GPU's queues full.
        """
        transfer.add_to(self._witness, _LONGEST_WAIT_S)
        return self._record(self._witness)

    def _record(self, stream: int | None) -> int:
        with cu.current(self._device.context) as driver:
            self._events.append(int(cu.check(driver.cuEventCreate(0), "cuEventCreate")))
            cu.check(driver.cuEventRecord(self._events[-1], stream), "cuEventRecord")
        return len(self._events) - 1

    def passed(self, event: int) -> bool:
        """Whether all kernels before an event have ended."""
        with cu.current(self._device.context) as driver:
            (code,) = driver.cuEventQuery(self._events[event])
        if code != driver.CUresult.CUDA_ERROR_NOT_READY:
            cu.check((code,), "cuEventQuery")
        return not int(code)

    def wait(self, event: int) -> None:
        """Returns when it has passed; TransferTimeoutError after a minute."""
        if not poll(lambda: self.passed(event), time.monotonic() + _LONGEST_WAIT_S):
            raise TransferTimeoutError(f"a computation of milliseconds did not end in {_LONGEST_WAIT_S} s")

    def seconds(self, first: int, last: int) -> float:
        """Waits for both events; from the first to the last of them, less than 0 where that one passed before."""
        self.wait(first)
        self.wait(last)
        with cu.current(self._device.context) as driver:
            elapsed = driver.cuEventElapsedTime(self._events[first], self._events[last])
            return float(cu.check(elapsed, "cuEventElapsedTime")) * 1e-3

    def close(self) -> None:
        """Waits for the end, and frees all."""
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            for stream in (self._stream, self._witness):
                if stream is not None:
                    driver.cuStreamSynchronize(stream)
                    driver.cuStreamDestroy(stream)
            while self._events:
                driver.cuEventDestroy(self._events.pop())
            if self._module is not None:
                driver.cuModuleUnload(self._module)
        self._stream = self._witness = self._module = None
        with contextlib.suppress(DeviceError):
            self._counters.free()
