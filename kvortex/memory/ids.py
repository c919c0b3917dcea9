"""Pinned, mapped host arrays for the block ids of running transfers, each with as much VRAM beside it, reused by size."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from kvortex.devices.base import Device, DeviceBuffer
from kvortex.errors import DeviceError

# Ids and buffers, 1.5 MiB in all. A layer-wise save takes one for each of its groups; a block of 2 MiB one of 4096 for its
# sums, and several blocks one of 16384.
_READY = ((1024, 64), (4096, 32), (16384, 12))


class IdBuffer:
    """Room for ``capacity`` int32 block ids.

    Attributes
    ----------
    ids : (capacity,) int32
        Pinned host memory.
    address, mirror : int
        Of ``ids``, which kernels may read over the link, and of as much VRAM.
    capacity : int
    """

    def __init__(self, address: int, capacity: int, mirror: int) -> None:
        self.address, self.mirror, self.capacity = address, mirror, capacity
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
        self._mirrors: list[DeviceBuffer] = []
        try:
            at, mirror = self._allocate(sum(capacity * count for capacity, count in _READY))
        except BaseException:
            self.close()
            raise
        for capacity, count in _READY:
            for _ in range(count):
                self._free[capacity].append(IdBuffer(at, capacity, mirror))
                at, mirror = at + 4 * capacity, mirror + 4 * capacity

    def _allocate(self, capacity: int) -> tuple[int, int]:
        """Addresses of pinned memory and of VRAM; what was had before one of them failed is kept until the end."""
        # By name, and not as the last entry: another thread may have added one of its own since.
        self._all.append(address := self._device.allocate_pinned(capacity * 4))
        self._mirrors.append(mirror := self._device.allocate(capacity * 4))
        return address, mirror.address

    def take(self, count: int) -> IdBuffer:
        """A buffer for at least ``count`` ids; sizes are powers of four, so that few sizes serve all transfers."""
        capacity = _READY[0][0]
        while capacity < count:
            capacity *= 4
        with self._lock:
            if self._free[capacity]:
                return self._free[capacity].pop()
        address, mirror = self._allocate(capacity)  # can take long, and others need not wait for it
        return IdBuffer(address, capacity, mirror)

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
            while self._mirrors:
                with contextlib.suppress(DeviceError):
                    self._mirrors.pop().free()
            self._free.clear()
