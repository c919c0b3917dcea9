"""Pinned, mapped host arrays for the block ids of running transfers, reused by size."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from kvortex.devices.base import Device
from kvortex.errors import DeviceError

_READY = ((1024, 16), (4096, 8), (16384, 4))  # ids and buffers: 448 KiB


class IdBuffer:
    """Room for ``capacity`` int32 block ids that kernels read over the link."""

    def __init__(self, address: int, capacity: int) -> None:
        self.address = address
        self.capacity = capacity
        self.ids: npt.NDArray[np.int32] = np.ctypeslib.as_array((ctypes.c_int32 * capacity).from_address(address))


class IdPool:
    """Hands out :class:`IdBuffer` objects; thread-safe. One is given back when no kernel reads it any more.

    Some are made at the start: allocating pinned memory can wait for whatever the GPU is doing.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._free: dict[int, list[IdBuffer]] = defaultdict(list)
        self._all: list[int] = []
        at = self._allocate(sum(capacity * count for capacity, count in _READY))
        for capacity, count in _READY:
            for _ in range(count):
                self._free[capacity].append(IdBuffer(at, capacity))
                at += 4 * capacity

    def _allocate(self, capacity: int) -> int:
        self._all.append(self._device.allocate_pinned(capacity * 4))
        return self._all[-1]

    def take(self, count: int) -> IdBuffer:
        """A buffer for at least ``count`` ids; sizes are powers of four, so that few sizes serve all transfers."""
        capacity = _READY[0][0]
        while capacity < count:
            capacity *= 4
        with self._lock:
            if self._free[capacity]:
                return self._free[capacity].pop()
        return IdBuffer(self._allocate(capacity), capacity)  # can take long, and others need not wait for it

    def give(self, buffer: IdBuffer) -> None:
        """Takes a buffer back."""
        with self._lock:
            self._free[buffer.capacity].append(buffer)

    def close(self) -> None:
        """Frees all. Nothing may be in flight. A second call does nothing."""
        with self._lock:
            while self._all:
                with contextlib.suppress(DeviceError):  # a lost context frees nothing, and must not keep others from closing
                    self._device.free_pinned(self._all.pop())
            self._free.clear()
