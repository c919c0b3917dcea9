"""The DMAs of a chunk between the host and a GPU, by calls that hold no GIL: one by one, in lines, or in a batch."""

from __future__ import annotations

import numpy as np

from kvortex.devices.driver import COPY_BATCH, COPY_BATCH_12, COPY_LINES, COPY_TO_DEVICE, COPY_TO_HOST
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.plan import (
    COPY_BYTES,
    DEVICE_SIDE,
    FIRST_COPY,
    HOST_PITCH,
    HOST_SIDE,
    LINES,
    N_COPIES,
    PITCH,
)

# Cells of ``scratch``: where the popped context goes, then a CUDA_MEMCPY2D (cuda.h): of each side x, y, kind of memory, host
# address, device address, array, pitch; then bytes of a line, and lines. Behind it what a batch of copies needs: a
# CUmemcpyAttributes, the first copy that it is for, and where the index of a copy that failed goes; a thread's mode of
# capture; and a timespec.
POPPED, RECTANGLE = 0, 1
ATTRIBUTES = RECTANGLE + 16
FIRST_OF_BATCH, FAILED_COPY = ATTRIBUTES + 3, ATTRIBUTES + 4
MODE = FAILED_COPY + 1
TIME = MODE + 1
SCRATCH_CELLS = TIME + 2
_SIDE_CELLS, _KIND, _HOST, _DEVICE, _PITCH = 7, 2, 3, 4, 6
_KIND_HOST, _KIND_DEVICE = 1, 2
# A CUmemcpyAttributes is six 32-bit numbers: the order of reads, of both sides a kind and number of a place, which only
# managed memory needs, and flags. CU_MEMCPY_SRC_ACCESS_ORDER_STREAM; CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE.
_ORDER_STREAM, _OVERLAP = 1, 1 << 32


@njit(nogil=True)
def fill_rectangle(to_host, copy, device, scratch):  # type: ignore[no-untyped-def]
    """What the driver is told of a copy in lines."""
    rectangle = scratch[RECTANGLE:]
    rectangle[:] = 0
    there, here = (0, _SIDE_CELLS) if to_host else (_SIDE_CELLS, 0)
    rectangle[there + _KIND] = _KIND_DEVICE
    rectangle[there + _DEVICE] = device
    rectangle[there + _PITCH] = copy[PITCH]
    rectangle[here + _KIND] = _KIND_HOST
    rectangle[here + _HOST] = copy[HOST_SIDE]
    rectangle[here + _PITCH] = copy[HOST_PITCH]
    rectangle[2 * _SIDE_CELLS] = copy[COPY_BYTES]
    rectangle[2 * _SIDE_CELLS + 1] = copy[LINES]


@njit(nogil=True)
def copy_chunk(to_host, functions, copies, chunk, base, stream, scratch):  # type: ignore[no-untyped-def]
    """The copies of a chunk, with the staging buffer ``base`` on the device side; the first error code."""
    for at in range(chunk[FIRST_COPY], chunk[FIRST_COPY] + chunk[N_COPIES]):
        device, host, nbytes = copies[at, DEVICE_SIDE] + base, copies[at, HOST_SIDE], copies[at, COPY_BYTES]
        if copies[at, LINES] > 1:
            fill_rectangle(to_host, copies[at], device, scratch)
            code = call(functions[COPY_LINES], (scratch[RECTANGLE:].ctypes.data, stream))
        elif to_host:
            code = call(functions[COPY_TO_HOST], (host, device, nbytes, stream))
        else:
            code = call(functions[COPY_TO_DEVICE], (device, host, nbytes, stream))
        if code:
            return code
    return np.int32(0)


@njit(nogil=True)
def copy_batch(to_host, functions, batch, chunk, stream, scratch):  # type: ignore[no-untyped-def]
    """The copies of a chunk in one call of the driver.

    It reads its arguments during the call and not afterwards: NVIDIA's own ``cuda.core.utils.copy_batch`` passes vectors that
    end with the function. It refuses the legacy default stream; those of a lane are others.
    """
    first, count = chunk[FIRST_COPY], chunk[N_COPIES]
    device = batch[DEVICE_SIDE, first:].ctypes.data
    host = batch[HOST_SIDE, first:].ctypes.data
    sizes = batch[COPY_BYTES, first:].ctypes.data
    attributes = scratch[ATTRIBUTES:]
    attributes[0], attributes[1], attributes[2] = _ORDER_STREAM, 0, _OVERLAP
    scratch[FIRST_OF_BATCH] = 0
    target, source = (host, device) if to_host else (device, host)
    head = (target, source, sizes, count, attributes.ctypes.data, scratch[FIRST_OF_BATCH:].ctypes.data, 1)
    if functions[COPY_BATCH]:
        return call(functions[COPY_BATCH], (*head, stream))
    return call(functions[COPY_BATCH_12], (*head, scratch[FAILED_COPY:].ctypes.data, stream))
