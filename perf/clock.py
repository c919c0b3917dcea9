"""Time by the device: a stream between two events; on the host device, by the host's clock."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.devices import Device
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.streams import cuda_stream_handle
from perf import issue


class Clock(ABC):
    """Times work."""

    @abstractmethod
    def seconds(self, work: Callable[[], Any]) -> float:
        """Calls ``work`` and gives the time until what it put on the clock's stream has ended."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the clock owns."""


class HostClock(Clock):
    """Of work that has ended when its call returns."""

    def seconds(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def close(self) -> None:
        """Nothing to free."""


class CudaClock(Clock):
    """Two events on a stream of a GPU.

    Parameters
    ----------
    device
    stream
        Whose work is timed; None for a new one, never the legacy default stream.

    Attributes
    ----------
    cells : (5,) int64
        Context, stream and events, for :mod:`perf.issue`.
    """

    def __init__(self, device: CudaDevice, stream: Any = None) -> None:
        self._device = device
        self.cells = np.zeros(issue.CLOCK_CELLS, np.int64)
        self.cells[issue.CONTEXT] = int(device.context)
        with cu.current(device.context) as driver:
            own = stream is None
            if own:
                stream = cu.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING), "cuStreamCreate")
            self._stream = stream if own else None
            self.cells[issue.STREAM] = int(stream) if own else cuda_stream_handle(stream)
            self._events = [cu.check(driver.cuEventCreate(0), "cuEventCreate") for _ in range(2)]
        self.cells[issue.FIRST : issue.LAST + 1] = [int(event) for event in self._events]

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self.cells[issue.STREAM])

    def seconds(self, work: Callable[[], Any]) -> float:
        first, last = self._events
        with cu.current(self._device.context) as driver:
            cu.check(driver.cuEventRecord(first, self.stream), "cuEventRecord")
            work()
            cu.check(driver.cuEventRecord(last, self.stream), "cuEventRecord")
        return self.elapsed()

    def elapsed(self) -> float:
        """Waits for the last event; seconds since the first one."""
        first, last = self._events
        with cu.current(self._device.context) as driver:
            cu.check(driver.cuEventSynchronize(last), "cuEventSynchronize")
            return float(cu.check(driver.cuEventElapsedTime(first, last), "cuEventElapsedTime")) * 1e-3

    def done(self) -> bool:
        """Whether the last event has passed."""
        with cu.current(self._device.context) as driver:
            (code,) = driver.cuEventQuery(self._events[1])
            if code != driver.CUresult.CUDA_ERROR_NOT_READY:
                cu.check((code,), "cuEventQuery")
        return not int(code)

    def close(self) -> None:
        with cu.current(self._device.context) as driver:
            for event in self._events:
                cu.check(driver.cuEventDestroy(event), "cuEventDestroy")
            if self._stream is not None:
                cu.check(driver.cuStreamDestroy(self._stream), "cuStreamDestroy")


def clock_of(device: Device) -> Clock:
    """A clock for a device."""
    return CudaClock(device) if isinstance(device, CudaDevice) else HostClock()
