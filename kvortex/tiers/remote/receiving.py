"""Bytes from a socket to their place, digested while they are near: one call that holds no GIL."""

from __future__ import annotations

import ctypes
import functools
import socket
import time

import numpy as np

from kvortex.devices.native import call
from kvortex.digests.host import add_part, numbers
from kvortex.jit import njit

PIECE = 1 << 17  # bytes that are digested while they are in a core's second cache
_WAIT_ALL = socket.MSG_WAITALL
_CLOCK = time.CLOCK_MONOTONIC


@njit(nogil=True)
def _now(clock_gettime, spec):  # type: ignore[no-untyped-def]
    call(clock_gettime, (_CLOCK, spec.ctypes.data))
    return spec[0] * 1_000_000_000 + spec[1]


@njit(nogil=True)
def receive_part(recv, clock_gettime, fd, address, nbytes, offset, until, sums, fixed):  # type: ignore[no-untyped-def]
    """Reads up to ``nbytes`` of a record from a socket that blocks, piece by piece, and adds each to the record's digest.

    Ends early where the socket gives less than it was asked for (it waited too long, hung up, or failed; a signal came),
    and at ``until``, so that somebody looks whether to go on.

    Parameters
    ----------
    recv, clock_gettime : int
        Addresses of the C functions.
    fd, address, nbytes : int
    offset : int
        Of the first byte in the record.
    until : int
        Nanoseconds of the monotonic clock.
    sums : (2,) uint64
        Grow by what was read.
    fixed
        Of :func:`kvortex.digests.host.numbers`.

    Returns
    -------
    int
        Bytes that were read.
    """
    spec = np.empty(2, np.int64)
    done = 0
    while done < nbytes and _now(clock_gettime, spec) < until:
        count = min(PIECE, nbytes - done)
        got = call(recv, (fd, address + done, count, _WAIT_ALL))
        if got <= 0:
            break
        add_part(address + done, got, offset + done, sums, fixed)
        done += got
        if got < count:
            break
    return done


@functools.cache
def functions() -> tuple[int, int]:
    """``recv, clock_gettime`` of :func:`receive_part`."""
    library = ctypes.CDLL(None)
    recv, clock = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in (library.recv, library.clock_gettime))
    return recv, clock


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, which takes longer than some calls have time."""
    receive_part(*functions(), 0, 0, 0, 0, 0, np.zeros(2, np.uint64), numbers(0))
