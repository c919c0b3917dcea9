"""What an executor of a GPU digests of its transfers, and what kernels need for it: a table of numbers in VRAM, and kernels
that only read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from kvortex.devices.cuda import CudaDevice
from kvortex.digests.keys import kernel_numbers
from kvortex.errors import DeviceError
from kvortex.transfer.digesting import Digesting, Reading, buffers_reading, pieces_apart
from kvortex.transfer.issue.launching import PIECE_ROW_BYTES
from kvortex.transfer.plan import Int64s
from kvortex.transfer.routes import Route

_MOVED_BY_KERNELS = (Route.STAGED, Route.RESIDENT, Route.MAPPED)
ON_ONE_STREAM = (Route.STRIDED, Route.DIRECT)  # copies of a short load, since they are no faster on several


class Digests:
    """Of transfers that are digested, and of those of a codec that need not be.

    Parameters
    ----------
    summed
        Whether blocks are digested.

    Attributes
    ----------
    numbers : int
        Address of the table; 0 until :meth:`open`, or for good where nothing is digested.
    """

    def __init__(self, summed: bool) -> None:
        self.summed = summed
        self.numbers = 0
        self._table: Any = None
        self._readers: tuple[int, int] | None = None  # kernels that read pages, and buffers

    def open(self, device: CudaDevice, most_bytes: int, kernel: Callable[[str], int] | None) -> None:
        """Puts the table for records of at most so many bytes into VRAM; ``kernel`` loads one by its name, and is None where
        a codec's launches read what is digested."""
        if not self.summed:
            return
        numbers = kernel_numbers(most_bytes)
        self._table = device.allocate(numbers.nbytes)
        self._table.write(numbers)
        self.numbers = self._table.address
        if kernel is not None:
            self._readers = kernel("read_pages"), kernel("read_buffers")

    def close(self) -> None:
        """Frees the table."""
        if self._table is not None:
            with contextlib.suppress(DeviceError):
                self._table.free()

    def sizes(self, sizes: Int64s) -> Int64s | None:
        """Bytes of records whose sums make digests, or None where there are no sums."""
        return sizes if self.summed else None

    def of_blocks(
        self, route: Route, blocks: Int64s, table: int, first: int, last: int, *, whole: bool = True
    ) -> Digesting | None:
        """Of pages.

        Parameters
        ----------
        route
        blocks : (n,) int64
        table
            Address of the pieces in VRAM.
        first, last
            Pieces that are moved.
        whole
            Whether they are all that the caller waits for, and not one of many groups of layers, for which there is not that
            much room.
        """
        if self._readers is None:
            return None
        apart = pieces_apart(len(blocks), last - first) if whole and route is not Route.RESIDENT else 0
        if route in _MOVED_BY_KERNELS:
            return Digesting(len(blocks), self.numbers, None, apart)
        reading = Reading(self._readers[0], table + first * PIECE_ROW_BYTES, last - first, blocks.astype(np.int32))
        return Digesting(len(blocks), self.numbers, reading, apart)

    def of_buffers(self, addresses: Int64s, sizes: Int64s) -> Digesting | None:
        """Of contiguous buffers."""
        if self._readers is None:
            return None
        reading = buffers_reading(self._readers[1], addresses, sizes)
        return Digesting(len(sizes), self.numbers, reading, pieces_apart(len(sizes), reading.n_pieces))

    def of_records(self, count: int) -> Digesting:
        """Of a codec's records, whose launches also say of each whether it fits, or is one."""
        return Digesting(count, self.numbers, coded=True, summed=self.summed)
