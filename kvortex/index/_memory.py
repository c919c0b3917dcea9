"""Zeroed memory for tables that are read at random: aligned to cache lines, and on huge pages where it is large."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

_LINE = 64
_HUGE_PAGE = 2 << 20
_LARGE = 2 * _HUGE_PAGE


def zeros(nbytes: int) -> npt.NDArray[np.uint8]:
    """(nbytes,) uint8 of zeros, aligned to 64 bytes.

    From 4 MiB on it is mapped, aligned to huge pages, and the kernel is asked for them (``MADV_HUGEPAGE``): a random access
    then seldom misses the translation of its address as well. Where it refuses, pages are of the usual size. Resident only
    where it was touched; freed with the last view of it.

    Raises
    ------
    MemoryError
    """
    if nbytes < _LARGE:
        memory = np.zeros(nbytes + _LINE, np.uint8)
        skip = -memory.ctypes.data % _LINE
        return memory[skip : skip + nbytes]
    try:
        # Address space for one huge page more, so that the start can be aligned; it is never touched.
        mapped = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"cannot map {nbytes} bytes for the index: {error}") from None
    memory = np.frombuffer(mapped, np.uint8)
    skip = -memory.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE, skip, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    return memory[skip : skip + nbytes]
