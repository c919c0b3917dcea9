"""The floor: one contiguous copy over the link, timed by the device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from kvortex.devices import Device, HostStream
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.memory.arena import PinnedArena
from perf import issue
from perf.clock import CudaClock, HostClock

IN_FLIGHT = 2  # copies that :meth:`RawCopy.start` may have running


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
        self._turn = 0
        # A stream for each direction: on a stream that has copied both ways a copy may wait as long as another stream copies
        # the other way without a pause, and that is for ever where two directions are measured at once.
        self._clocks: dict[bool, list[CudaClock]] = {}
        if isinstance(device, CudaDevice):
            self._functions = cu.functions()
            for to_host in (True, False):
                first = CudaClock(device)
                self._clocks[to_host] = [first, *(CudaClock(device, first.stream) for _ in range(IN_FLIGHT - 1))]
        else:
            self._worker = HostStream()

    def seconds(self, *, to_host: bool, nbytes: int | None = None) -> float:
        """Time of one copy of the first ``nbytes`` bytes; None for all."""
        size = self.nbytes if nbytes is None else nbytes
        if not self._clocks:
            return HostClock().seconds(lambda: ctypes.memmove(*self._pair(to_host), size))
        clock = self._clocks[to_host][0]
        self._issue(clock, to_host, size)
        return clock.elapsed()

    def start(self, *, to_host: bool) -> Callable[[], bool]:
        """Starts a copy behind the one before it; the result says whether it has ended. Two may run at a time, all one way."""
        if not self._clocks:
            self._worker.enqueue(lambda: ctypes.memmove(*self._pair(to_host), self.nbytes))
            return self._worker.record().query
        clock = self._clocks[to_host][self._turn % IN_FLIGHT]
        self._turn += 1
        self._issue(clock, to_host, self.nbytes)
        return clock.done

    def _pair(self, to_host: bool) -> tuple[int, int]:
        """Target and source."""
        pair = self._arena.address, self._buffer.address
        return pair if to_host else pair[::-1]

    def _issue(self, clock: CudaClock, to_host: bool, nbytes: int) -> None:
        table = np.array([*self._pair(to_host), nbytes], np.int64).reshape(issue.TABLE_ROWS, 1)
        which = cu.COPY_TO_HOST if to_host else cu.COPY_TO_DEVICE
        cu.check((issue.copy_each(self._functions, clock.cells, which, table),), "a contiguous copy")

    def wrong_bytes(self, nbytes: int | None = None) -> int:
        """Copies random bytes out and others back, and counts those that did not arrive."""
        size = self.nbytes if nbytes is None else nbytes
        data, host = np.random.default_rng(size).integers(0, 256, size, np.uint8), self._arena.view(0, size)
        self._buffer.write(data)
        self.seconds(to_host=True, nbytes=size)
        wrong = int((host != data).sum())
        np.invert(data, out=host)
        self.seconds(to_host=False, nbytes=size)
        return wrong + int((self._buffer.read(0, size) != ~data).sum())

    def close(self) -> None:
        """Frees the memory, stream and events."""
        for clocks in self._clocks.values():
            for clock in reversed(clocks):  # the stream belongs to the first one
                clock.close()
        if not self._clocks:
            self._worker.close()
        self._clocks = {}
        self._arena.close()
        self._buffer.free()
