"""Copies on the host device: compiled loops of ``memcpy`` that hold no GIL."""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from kvortex.devices.native import call, memcpy_address
from kvortex.transfer.plan import BASE, BYTES, OFFSET, STRIDE


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def copy_paged(memcpy, fragments, blocks, records, to_host):  # type: ignore[no-untyped-def]
    """Copies fragments of pages to records or back.

    Parameters
    ----------
    memcpy : int
        Address of the C function.
    fragments : (F, 4) int64
        Address in block 0, block stride, offset in the record, bytes.
    blocks, records : (n,) int64
        Page of each record, and the record's address.
    to_host : bool
        From pages to records; else from records to pages.
    """
    for b in range(len(blocks)):
        for f in range(len(fragments)):
            page = fragments[f, BASE] + blocks[b] * fragments[f, STRIDE]
            part = records[b] + fragments[f, OFFSET]
            if to_host:
                call(memcpy, (part, page, fragments[f, BYTES]))
            else:
                call(memcpy, (page, part, fragments[f, BYTES]))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def copy_buffers(memcpy, addresses, sizes, records, to_host):  # type: ignore[no-untyped-def]
    """Copies contiguous buffers to records or back: (n,) int64 addresses, bytes, and addresses of records."""
    for b in range(len(addresses)):
        if to_host:
            call(memcpy, (records[b], addresses[b], sizes[b]))
        else:
            call(memcpy, (addresses[b], records[b], sizes[b]))


@functools.cache
def load_compiled() -> None:
    """Loads these functions, or compiles them, once in a process: not in the middle of the first transfer."""
    none, rows, layouts_own = np.empty(0, np.int64), np.empty((0, 4), np.int64), np.empty((0, 4), np.int64)
    layouts_own.setflags(write=False)  # another type to the compiler
    copy_paged(memcpy_address(), rows, none, none, True)
    copy_paged(memcpy_address(), layouts_own, none, none, True)
    copy_buffers(memcpy_address(), none, none, none, True)
