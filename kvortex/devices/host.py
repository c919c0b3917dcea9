"""The host as a device: ordinary RAM stands for VRAM, threads for streams.

It runs the whole engine where there is no GPU, with the rules of the GPU: work on a stream is in order and
asynchronous, and only events order streams among each other.
"""

from __future__ import annotations

import functools
import os
import platform
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.arguments import integer, seconds
from kvortex.devices.base import Bytes, Device, DeviceBuffer
from kvortex.errors import ArgumentError, DeviceError, TransferTimeoutError, shown, told

_LONGEST_WAIT_S = 3600.0  # of one stream for another: then its later work is given up, and whoever waits for it hears of that


class HostBuffer(DeviceBuffer):
    """RAM that stands for VRAM; ``array`` is its (nbytes,) uint8 view."""

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ArgumentError(f"a buffer of {nbytes} bytes cannot be")
        try:
            whole = np.empty(nbytes + 255, np.uint8)
        except (MemoryError, ValueError, OverflowError) as error:  # more than there is, or than NumPy can count
            raise DeviceError(f"cannot allocate {nbytes} bytes of host memory: {error}") from error
        skip = -whole.ctypes.data % 256
        self.array: Bytes = whole[skip : skip + nbytes]
        self.address = int(self.array.ctypes.data)
        self.nbytes = nbytes

    def write(self, data: npt.NDArray[Any], offset: int = 0) -> None:
        flat = self._bytes_of(data)
        first, nbytes = self._inside(offset, flat.size)
        self.array[first : first + nbytes] = flat

    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        first, count = self._inside(offset, nbytes)
        return self.array[first : first + count].copy()

    def free(self) -> None:
        self.array, self.nbytes = np.empty(0, np.uint8), 0


class HostEvent:
    """A point in a :class:`HostStream`'s work, or the end of a transfer.

    Attributes
    ----------
    error : BaseException or None
        What work before this point raised, once the point is reached.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._passed = threading.Event()
        self._lock = threading.RLock()
        self._then: list[Callable[[], None]] = []

    def set(self, error: BaseException | None = None) -> None:
        """Marks the point as reached."""
        with self._lock:
            self.error = error
            self._passed.set()
            then, self._then = self._then, []
        for work in then:
            work()

    def when_set(self, work: Callable[[], None]) -> None:
        """Calls ``work``, which must not block or raise, once the point is reached: now, or in the thread that gets there."""
        with self._lock:
            if not self._passed.is_set():
                self._then.append(work)
                return
        work()

    def query(self) -> bool:
        """Whether the point was reached."""
        return self._passed.is_set()

    def synchronize(self, timeout: float = 60.0) -> bool:
        """Waits until the point is reached; False when ``timeout`` seconds went by first."""
        return self._passed.wait(min(seconds(timeout), threading.TIMEOUT_MAX))


_Work: TypeAlias = "Callable[[], None] | HostEvent"


class HostStream:
    """Work done in order by one daemon thread, which ends by itself when the stream is dropped or closed.

    A caller on the host device passes one as ``stream=`` to order its own asynchronous work with transfers, as a CUDA
    caller passes a CUDA stream. NumPy code that runs in the calling thread needs none.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self.closed = False
        self._thread = threading.Thread(
            target=_run, args=(self._work,), name="kvortex-host-stream", daemon=True
        )
        self._thread.start()

    def enqueue(self, work: Callable[[], None]) -> None:
        """Adds work. Should it raise, no later work of this stream is done, and whoever waits for the stream hears of it:
        as with a kernel that crashes, nothing behind it can be trusted. ArgumentError for what cannot be called."""
        self._check_open()
        if not callable(work):  # None would end the thread
            raise ArgumentError(f"{shown(work)} is no work for a host stream: pass a function without arguments")
        self._work.put(work)

    def record(self) -> HostEvent:
        """An event that is reached when all work enqueued so far is done."""
        self._check_open()
        event = HostEvent()
        self._work.put(event)
        return event

    def wait(self, event: HostEvent) -> None:
        """Makes later work wait for an event of another stream, for an hour at most."""
        self._check_open()
        if not isinstance(event, HostEvent):
            raise ArgumentError(f"{shown(event)} is no event of a host stream: pass what record() returned")
        self._work.put(functools.partial(_wait_for, event))

    def synchronize(self, timeout: float = 60.0) -> None:
        """Waits until all work enqueued so far is done.

        Raises
        ------
        ArgumentError
            The timeout is no number of seconds.
        TransferTimeoutError
            It was not after ``timeout`` seconds.
        DeviceError
            Work of this stream raised.
        """
        allowed, event = seconds(timeout), self.record()
        if not event.synchronize(allowed):
            raise TransferTimeoutError(f"a host stream was not idle after {allowed} s")
        if event.error is not None:
            raise DeviceError(f"work of a host stream raised {told(event.error)}") from event.error

    def close(self) -> None:
        """Ends the thread after the work enqueued so far. A closed stream takes no more."""
        self.closed = True
        self._work.put(None)

    def _check_open(self) -> None:
        if self.closed:
            raise ArgumentError("this host stream was closed")

    def __del__(self) -> None:
        self._work.put(None)


def _wait_for(event: HostEvent) -> None:
    if not event.synchronize(_LONGEST_WAIT_S):
        raise TransferTimeoutError(f"a host stream waited {_LONGEST_WAIT_S} s for an event of another one")
    if event.error is not None:
        raise event.error


def _run(work: queue.SimpleQueue[_Work | None]) -> None:
    failure: BaseException | None = None
    while (item := work.get()) is not None:
        if isinstance(item, HostEvent):
            item.set(failure)
        elif failure is None:
            try:
                item()
            except BaseException as raised:  # whatever it is, the events behind it must still be reached
                failure = raised


class HostDevice(Device):
    """Ordinary RAM in the place of VRAM."""

    name = "host"

    def __init__(self) -> None:
        self._pinned: dict[int, HostBuffer] = {}

    def allocate(self, nbytes: int) -> HostBuffer:
        return HostBuffer(integer(nbytes, "nbytes", 1))

    def pin(self, address: int, nbytes: int) -> None:
        """Nothing: any memory can be copied by threads."""

    def unpin(self, address: int) -> None:
        """Nothing."""

    def allocate_pinned(self, nbytes: int) -> int:
        buffer = self.allocate(nbytes)
        self._pinned[buffer.address] = buffer
        return buffer.address

    def free_pinned(self, address: int) -> None:
        del self._pinned[address]

    def owner_of(self, address: int) -> str | None:
        return None

    def numa_node(self) -> int | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"device": self.name, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
