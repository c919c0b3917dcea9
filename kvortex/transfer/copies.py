"""Copies on the host device: compiled loops of ``memcpy`` that hold no GIL, and may digest what they copy."""

from __future__ import annotations

import functools

import numpy as np

from kvortex.devices.native import call, memcpy_address
from kvortex.digests.host import copy_part, numbers
from kvortex.jit import njit
from kvortex.transfer.plan import BASE, BYTES, OFFSET, STRIDE


@njit(nogil=True)
def copy_paged(memcpy, fragments, blocks, records, sums, to_host, fixed):  # type: ignore[no-untyped-def]
    """Copies fragments of pages to records or back.

    Parameters
    ----------
    memcpy : int
        Address of the C function.
    fragments : (F, 4) int64
        Address in block 0, block stride, offset in the record, bytes.
    blocks, records : (n,) int64
        Page of each record, and the record's address.
    sums : (n, 2) uint64
        What the bytes of the pages add to digests is added here; (0, 2) for no digests.
    to_host : bool
        From pages to records; else from records to pages.
    fixed
        Of :func:`kvortex.digests.host.numbers`.
    """
    c, lows, highs, r = fixed
    digests = len(sums) > 0
    for b in range(len(blocks)):
        for f in range(len(fragments)):
            page = fragments[f, BASE] + blocks[b] * fragments[f, STRIDE]
            offset, nbytes = fragments[f, OFFSET], fragments[f, BYTES]
            part = records[b] + offset
            target, source = (part, page) if to_host else (page, part)
            if digests:
                first, second = copy_part(memcpy, target, source, nbytes, to_host, offset, c, lows, highs, r)
                sums[b, 0] += first
                sums[b, 1] += second
            else:
                call(memcpy, (target, source, nbytes))


@njit(nogil=True)
def copy_buffers(memcpy, addresses, sizes, records, sums, to_host, fixed):  # type: ignore[no-untyped-def]
    """Copies contiguous buffers to records or back: (n,) int64 addresses, bytes, and addresses of records. The rest as of
    :func:`copy_paged`."""
    c, lows, highs, r = fixed
    digests = len(sums) > 0
    for b in range(len(addresses)):
        target, source = (records[b], addresses[b]) if to_host else (addresses[b], records[b])
        if digests:
            first, second = copy_part(memcpy, target, source, sizes[b], to_host, 0, c, lows, highs, r)
            sums[b, 0] += first
            sums[b, 1] += second
        else:
            call(memcpy, (target, source, sizes[b]))


@functools.cache
def load_compiled() -> None:
    """Loads these functions, or compiles them, once in a process: not in the middle of the first transfer."""
    none, rows, layouts_own = np.empty(0, np.int64), np.empty((0, 4), np.int64), np.empty((0, 4), np.int64)
    layouts_own.setflags(write=False)  # another type to the compiler
    sums, fixed = np.empty((0, 2), np.uint64), numbers(0)
    copy_paged(memcpy_address(), rows, none, none, sums, True, fixed)
    copy_paged(memcpy_address(), layouts_own, none, none, sums, True, fixed)
    copy_buffers(memcpy_address(), none, none, none, sums, True, fixed)
