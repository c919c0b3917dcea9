"""Memory that O_DIRECT takes: pages of a thread's own, and views of slots."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from kvortex.tiers.record import HEADER, Headers

PAGE = 4096  # what addresses, lengths and offsets are multiples of: enough for every drive, also those of 4 KiB blocks


def padded(nbytes: int) -> int:
    """The next multiple of ``PAGE``."""
    return -(-nbytes // PAGE) * PAGE


def view(address: int, nbytes: int) -> memoryview:
    """Bytes in host memory, without a copy, for as long as they are there."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


class Pages:
    """What one thread reads headers and the ends of payloads into, and writes them from.

    A payload's last bytes go through a page of the thread's, so nothing behind them is read or written, whatever lies there.

    Attributes
    ----------
    header, tail : memoryview
        A page each.
    headers : (1,) HEADER
        The same memory as ``header``.
    address : int
        Of it.
    """

    def __init__(self) -> None:
        whole = memoryview(mmap.mmap(-1, 2 * PAGE))
        self.header, self.tail = whole[:PAGE], whole[PAGE:]
        self.headers: Headers = np.frombuffer(self.header, HEADER, 1)
        self.address = self.headers.ctypes.data

    def put_header(self, header: bytes) -> None:
        """The page of a header: behind it are zeros."""
        self.header[:] = header.ljust(PAGE, b"\0")

    def to_write(self, address: int, nbytes: int) -> list[memoryview]:
        """What is written of a payload: whole pages where they lie, and the last bytes with zeros behind them."""
        whole = nbytes // PAGE * PAGE
        parts = [self.header, view(address, whole)] if whole else [self.header]
        if rest := nbytes - whole:
            self.tail[:rest] = view(address + whole, rest)
            self.tail[rest:] = bytes(PAGE - rest)
            parts.append(self.tail)
        return parts

    def to_read(self, address: int, nbytes: int) -> list[memoryview]:
        """What a payload is read into; :meth:`arrived` then completes it."""
        whole = nbytes // PAGE * PAGE
        parts = [self.header, view(address, whole)] if whole else [self.header]
        return [*parts, self.tail] if nbytes > whole else parts

    def arrived(self, address: int, nbytes: int) -> None:
        """Puts the last bytes of a payload that was read to their place."""
        whole = nbytes // PAGE * PAGE
        if rest := nbytes - whole:
            view(address + whole, rest)[:] = self.tail[:rest]
