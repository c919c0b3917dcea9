"""The pinned host pool of one engine, carved into slots of one size."""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np

from kvortex.devices.base import Bytes, Device
from kvortex.errors import ConfigError, DeviceError, PinnedMemoryError
from kvortex.memory.mapping import Mapping
from kvortex.memory.numa import node_count

SLOT_ALIGNMENT = 4096  # O_DIRECT's block, and a multiple of every DMA and lane alignment
MAX_SEGMENT = 64 << 30  # one registration beyond this fails on some drivers (vLLM PR #51081 saw it at 512 GiB)


class PinnedArena:
    """Slots of pinned memory, each starting on a multiple of 4 KiB.

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
        self.segment_slots = max(1, MAX_SEGMENT // self.slot_bytes)
        self._device = device
        self._mapping: Mapping | None = None
        self._allocated: int | None = None
        self._registered: list[int] = []
        node = device.numa_node() if numa and node_count() > 1 else None
        self._mapping = Mapping(self.nbytes, node)
        self.notes = list(self._mapping.notes)
        self.address = self._mapping.address
        self.pinned_by = "register"
        try:
            try:
                self._register()
            except DeviceError as refusal:
                self._allocate(refusal)
        except BaseException:
            self.close()
            raise

    def _register(self) -> None:
        step = self.segment_slots * self.slot_bytes
        try:
            for start in range(0, self.nbytes, step):
                self._registered.append(self.address + start)  # first, so that an interrupt cannot lose it
                self._device.pin(self.address + start, min(step, self.nbytes - start))
        except DeviceError:
            self._registered.pop()
            self._unregister()
            raise

    def _allocate(self, refusal: DeviceError) -> None:
        """Some platforms (Confidential Computing, some containers) refuse registration and allow allocation."""
        assert self._mapping is not None
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
        self.segment_slots = self.slots
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
        self._unregister()
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._allocated is not None:
            with contextlib.suppress(DeviceError):
                self._device.free_pinned(self._allocated)
            self._allocated = None
