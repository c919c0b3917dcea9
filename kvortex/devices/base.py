"""The contract of a device: memory that holds KV pages, host memory pinned for it, and where it sits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from kvortex.arguments import LARGEST, integer, refuse_masked
from kvortex.errors import ArgumentError, cut

Bytes = npt.NDArray[np.uint8]


class DeviceBuffer(ABC):
    """Memory of a device, owned by this object until :meth:`free`.

    Attributes
    ----------
    address : int
    nbytes : int
    """

    address: int
    nbytes: int

    @abstractmethod
    def write(self, data: npt.NDArray[Any], offset: int = 0) -> None:
        """Copies a host array, in C order, to ``offset`` bytes into the buffer; returns when the bytes are there.

        Raises
        ------
        ArgumentError
            The array holds objects or is masked, or it does not lie inside the buffer.
        """

    @abstractmethod
    def read(self, offset: int = 0, nbytes: int | None = None) -> Bytes:
        """Copies bytes to a new host array, (nbytes,) uint8; sees all work issued to the device before the call.

        ``nbytes`` is None for all that is behind ``offset``. ArgumentError where that does not lie inside the buffer.
        """

    @abstractmethod
    def free(self) -> None:
        """Gives the memory back. A second call does nothing."""

    def _inside(self, offset: Any, nbytes: Any) -> tuple[int, int]:
        """Both as integers; ``nbytes`` None for all that is behind ``offset``."""
        first = integer(offset, "offset", -LARGEST)
        count = self.nbytes - first if nbytes is None else integer(nbytes, "nbytes", -LARGEST)
        if first < 0 or count < 0 or first + count > self.nbytes:
            raise ArgumentError(f"bytes [{first}, {first + count}) are not inside a buffer of {self.nbytes} bytes")
        return first, count

    def _bytes_of(self, data: Any) -> Bytes:
        """The bytes of a host array in C order, (n,); without a copy where it is contiguous."""
        array = np.asanyarray(data)
        refuse_masked(array, "data")
        if array.dtype.hasobject:
            raise ArgumentError(f"data must be an array of numbers; seen: dtype {cut(str(array.dtype))}")
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Device(ABC):
    """Where pages live. ``name`` is ``"host"`` or ``"cuda:N"``."""

    name: str

    @abstractmethod
    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Memory for KV pages, contents undefined, aligned to 256 bytes at least.

        Raises
        ------
        ArgumentError
            ``nbytes`` is no integer of at least 1.
        DeviceError
            There is not so much memory.
        """

    @abstractmethod
    def pin(self, address: int, nbytes: int) -> None:
        """Makes host memory ``[address, address + nbytes)`` reachable by DMA.

        Raises
        ------
        DeviceError
            The driver refuses; nothing stays pinned.
        """

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undoes one :meth:`pin`."""

    @abstractmethod
    def allocate_pinned(self, nbytes: int) -> int:
        """Address of new pinned host memory, mapped for the device."""

    @abstractmethod
    def free_pinned(self, address: int) -> None:
        """Gives :meth:`allocate_pinned` memory back."""

    @abstractmethod
    def owner_of(self, address: int) -> str | None:
        """Name of the device that an address belongs to, None where nothing is known of it."""

    @abstractmethod
    def numa_node(self) -> int | None:
        """NUMA node that the device is attached to, None where the machine has one node or does not say."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Facts for reports: name, and for a GPU driver, compute capability, memory, link."""
