"""The pinned host pool of one engine, carved into slots of one size."""

from __future__ import annotations

import contextlib
import ctypes
import threading

import numpy as np

from kvortex.devices.base import Bytes, Device
from kvortex.errors import ConfigError, DeviceError, PinnedMemoryError
from kvortex.memory import numa as numa_nodes
from kvortex.memory.filling import Filler
from kvortex.memory.mapping import Mapping

SLOT_ALIGNMENT = 4096  # O_DIRECT's block, and a multiple of every DMA and lane alignment
# Bytes of one registration, and of what becomes usable at a time. One registration of a large pool fails on some drivers
# (vLLM PR #51081 saw it at 512 GiB), and the first blocks need not wait for the last.
SEGMENT_BYTES = 512 << 20


class PinnedArena:
    """Slots of pinned memory, each starting on a multiple of 4 KiB.

    The first segment of slots is there when the constructor returns; the others follow, made by threads in the background:
    some fault the pages in, and one registers with the driver what is resident.

    Parameters
    ----------
    device
        The device that will reach the memory by DMA.
    budget
        Bytes that may be taken; the arena takes as many whole slots as fit.
    record_bytes
        Bytes of the largest record that a slot holds.
    numa
        Bind to the device's NUMA node where the machine has several.

    Attributes
    ----------
    address : int
        Of slot 0.
    slot_bytes : int
        From one slot to the next: ``record_bytes`` rounded up to 4 KiB.
    slots : int
        When all is there.
    ready : int
        Slots that may be used now: the first so many. Only grows.
    segment_slots : int
        Slots in one registration; a DMA must not cross from one into the next.
    pinned_by : str
        ``"register"`` or ``"alloc"``.
    notes : list of str
        What was wished for and could not be had.

    Raises
    ------
    ConfigError
        The budget does not hold one slot.
    PinnedMemoryError
        Neither way of pinning worked.
    """

    def __init__(self, device: Device, budget: int, record_bytes: int, *, numa: bool = True) -> None:
        self.slot_bytes = -(-record_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        self.slots = budget // self.slot_bytes
        if self.slots < 1:
            raise ConfigError(f"cpu_pool_size_bytes = {budget}: does not hold one block, which takes {self.slot_bytes} bytes")
        self.nbytes = self.slots * self.slot_bytes
        self.segment_slots = max(1, SEGMENT_BYTES // self.slot_bytes)
        self.ready = 0
        self._device = device
        self._mapping: Mapping | None = None
        self._allocated: int | None = None
        self._registered: list[int] = []
        self._filler: Filler | None = None
        self._builder: threading.Thread | None = None
        self._news = threading.Condition()
        self._stopped = False
        self._node = node = device.numa_node() if numa and numa_nodes.node_count() > 1 else None
        self._mapping = Mapping(self.nbytes, node)
        self.notes = list(self._mapping.notes)
        self.address = self._mapping.address
        self.pinned_by = "register"
        try:
            self._filler = Filler(self.address, self.nbytes)
            self._filler.start()
            try:
                self._add_segment()
            except DeviceError as refusal:
                self._allocate(refusal)
            if self.ready < self.slots:
                self._builder = threading.Thread(target=self._build, name="kvortex-arena", daemon=True)
                self._builder.start()
        except BaseException:
            self.close()
            raise

    def _add_segment(self) -> None:
        """Registers the next segment when it is resident."""
        assert self._filler is not None
        slots = min(self.segment_slots, self.slots - self.ready)
        start, nbytes = self.address + self.ready * self.slot_bytes, slots * self.slot_bytes
        if not self._filler.wait(start + nbytes - self.address):
            raise PinnedMemoryError("the threads that make the pool resident have stopped")
        self._registered.append(start)  # first, so that an interrupt cannot lose it
        try:
            self._device.pin(start, nbytes)
        except DeviceError:
            self._registered.pop()
            raise
        if self._node is not None and (reason := numa_nodes.misplaced(start, nbytes, self._node)):
            self.notes.append(reason)
        with self._news:
            self.ready += slots
            self._news.notify_all()

    def _build(self) -> None:
        """The rest. What cannot be had makes the pool smaller, and is told by a note: what is there works."""
        try:
            while self.ready < self.slots and not self._stopped:
                self._add_segment()
        except (DeviceError, PinnedMemoryError) as refusal:
            if not self._stopped:  # else it is being closed, which is no news
                self.notes.append(f"the pool has {self.ready} of {self.slots} slots: {refusal}")
            assert self._filler is not None
            self._filler.close()  # no use in faulting the rest in
        finally:
            with self._news:
                self._stopped = True
                self._news.notify_all()

    @property
    def growing(self) -> bool:
        """Whether more slots will be ready."""
        return self.ready < self.slots and not self._stopped

    def wait(self, slots: int, timeout: float) -> bool:
        """Blocks until so many slots are ready, or no more will be; False after ``timeout`` seconds."""
        with self._news:
            return self._news.wait_for(lambda: self.ready >= slots or not self.growing, min(timeout, threading.TIMEOUT_MAX))

    def _allocate(self, refusal: DeviceError) -> None:
        """Some platforms (Confidential Computing, some containers) refuse registration and allow allocation."""
        assert self._mapping is not None and self._filler is not None
        self._filler.close()
        self._mapping.close()
        self._mapping = None
        try:
            self._allocated = self.address = self._device.allocate_pinned(self.nbytes)
        except DeviceError as error:
            raise PinnedMemoryError(
                f"cannot pin {self.nbytes} bytes of host memory: registration said {refusal}; allocation said {error}. "
                "Lower cpu_pool_size_bytes, or raise the locked-memory limit (ulimit -l, or the container's memlock)."
            ) from error
        ctypes.memset(self.address, 0, self.nbytes)
        self.pinned_by = "alloc"
        self.segment_slots = self.ready = self.slots
        self.notes.append(f"registration refused: {refusal}")

    def _unregister(self) -> None:
        while self._registered:
            with contextlib.suppress(DeviceError):
                self._device.unpin(self._registered.pop())

    def view(self, slot: int, nbytes: int | None = None) -> Bytes:
        """The bytes of one slot, without a copy; valid until :meth:`close`."""
        size = self.slot_bytes if nbytes is None else nbytes
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address + slot * self.slot_bytes))

    def close(self) -> None:
        """Unpins and frees. Nothing may be in flight. A second call does nothing."""
        mine = self._filler is not None and self._filler.is_current()
        if mine or threading.current_thread() is self._builder:  # the collector came by there, in the middle of a segment
            threading.Thread(target=self.close, name="kvortex-arena-close", daemon=True).start()
            return
        self._stopped = True
        if self._filler is not None:
            self._filler.close()
        if self._builder is not None and self._builder.ident is not None:
            self._builder.join()
        self._unregister()
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._allocated is not None:
            with contextlib.suppress(DeviceError):
                self._device.free_pinned(self._allocated)
            self._allocated = None
