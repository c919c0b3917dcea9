"""Memory that a thread of a tier codes in: pages of its own, which are used again and given to one call at a time."""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvortex.devices.native import call, libc_address, memcpy_address
from kvortex.digests.host import add_lengths, numbers
from kvortex.jit import njit
from kvortex.tiers.base import Digests, Int64s
from kvortex.transfer import copies
from kvortex.transfer.copies import copy_buffers

_PAGE = 4096
Bytes = npt.NDArray[np.uint8]


def aligned(nbytes: int) -> int:
    """The next multiple of a page, where tiers want payloads to begin."""
    return -(-nbytes // _PAGE) * _PAGE


class Scratch:
    """Named memory, each piece at a page and as large as the largest that was asked for. Its bytes may be anything."""

    def __init__(self) -> None:
        self._pieces: dict[str, Bytes] = {}

    def rows(self, name: str, count: int, width: int) -> Bytes:
        """(count, width) uint8, contiguous. What was handed out under this name before is not to be used any more."""
        wanted = max(1, count * width)
        if name not in self._pieces or self._pieces[name].size < wanted:
            self._pieces.pop(name, None)  # before there is another, so that both are never there
            self._pieces[name] = np.frombuffer(mmap.mmap(-1, aligned(wanted)), np.uint8)
        return self._pieces[name][: count * width].reshape(count, width)

    def nbytes(self) -> int:
        """Of all pieces."""
        return sum(piece.size for piece in self._pieces.values())


class Scratches:
    """As many as calls are under way at a time."""

    def __init__(self) -> None:
        self._idle: list[Scratch] = []  # single operations of a list are atomic

    @contextlib.contextmanager
    def lent(self) -> Iterator[Scratch]:
        """One, for as long as a call takes."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = Scratch()
        try:
            yield scratch
        finally:
            self._idle.append(scratch)


@functools.lru_cache(16)
def _numbers(pages: int) -> tuple[npt.NDArray[np.generic], ...]:
    return numbers(pages * _PAGE)


def rows_at(rows: Bytes, count: int | None = None) -> Int64s:
    """(n,) int64: addresses of the first rows of contiguous memory, of all by default."""
    count = len(rows) if count is None else count
    return rows.ctypes.data + np.arange(count, dtype=np.int64) * rows.strides[0]


def copy(sources: Int64s, targets: Int64s, sizes: Int64s) -> None:
    """Copies n pieces of memory, in one call without the GIL."""
    copy_buffers(memcpy_address(), sources, sizes, targets, np.empty((0, 2), np.uint64), True, numbers(0))


def copy_digested(sources: Int64s, targets: Int64s, nbytes: int) -> Digests:
    """Copies n records of one length, and gives the digests of what lies at the targets, (n, 16) uint8."""
    sums, sizes = np.zeros((len(sources), 2), np.uint64), np.full(len(sources), nbytes, np.int64)
    copy_buffers(memcpy_address(), targets, sizes, sources, sums, False, _numbers(aligned(nbytes) // _PAGE))
    return add_lengths(sums, sizes)


@njit(nogil=True)
def _clear(memset, addresses, sizes):  # type: ignore[no-untyped-def]
    for at in range(len(addresses)):
        call(memset, (addresses[at], 0, sizes[at]))


def clear(addresses: Int64s, sizes: Int64s) -> None:
    """Puts zeros into n pieces of memory, in one call without the GIL."""
    _clear(libc_address("memset"), addresses, sizes)


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process."""
    none: Int64s = np.empty(0, np.int64)
    copies.load_compiled()
    clear(none, none)
