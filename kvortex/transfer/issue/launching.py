"""Launches of a chunk's kernels, by compiled code that holds no GIL."""

from __future__ import annotations

import numpy as np

from kvortex.devices.driver import LAUNCH
from kvortex.devices.native import call
from kvortex.jit import njit
from kvortex.transfer.digesting import IDS, NUMBERS, ONLY, PIECE_BYTES, RECORD_BYTES, SUMS, SUMS_BYTES
from kvortex.transfer.issue.cells import COUNTER_BYTES, COUNTERS, KERNEL, MAX_CTAS, TABLE, THREADS
from kvortex.transfer.plan import (
    ARGUMENTS,
    BUFFER,
    BYTES,
    COUNTER,
    CTAS,
    FIRST_BLOCK,
    FIRST_LAUNCH,
    FIRST_PIECE,
    INSTEAD,
    N_BLOCKS,
    N_LAUNCHES,
    N_PIECES,
    PARAMETERS,
    RELATIVE,
    WORK,
)
from kvortex.transfer.plan import KERNEL as LAUNCH_KERNEL
from kvortex.transfer.plan import THREADS as LAUNCH_THREADS

PIECE_ROW_BYTES = 8 * (BYTES + 1)


@njit(nogil=True)
def _launch(functions, lane, chunk, digest, bases, pitch, stream, parameters, pointers):  # type: ignore[no-untyped-def]
    n_pieces, n_blocks = chunk[N_PIECES], chunk[N_BLOCKS]
    parameters[0] = bases[BUFFER]
    parameters[1] = lane[TABLE] + chunk[FIRST_PIECE] * PIECE_ROW_BYTES
    parameters[2] = n_pieces
    parameters[3] = digest[IDS] + chunk[FIRST_BLOCK] * 4
    parameters[4] = n_blocks
    parameters[5] = pitch
    parameters[6] = digest[ONLY]
    parameters[7] = bases[COUNTER]
    if digest[SUMS_BYTES]:
        parameters[8] = digest[NUMBERS]
        parameters[9] = digest[SUMS] + chunk[FIRST_BLOCK] * digest[RECORD_BYTES] + chunk[FIRST_PIECE] * digest[PIECE_BYTES]
        parameters[10] = digest[RECORD_BYTES]
        parameters[11] = digest[PIECE_BYTES]
    warps = lane[THREADS] // 32
    ctas = min(lane[MAX_CTAS], (n_pieces * n_blocks + warps - 1) // warps)
    return call(
        functions[LAUNCH],
        (lane[KERNEL], ctas, 1, 1, lane[THREADS], 1, 1, 0, stream, pointers.ctypes.data, 0),
    )


@njit(nogil=True)
def _launch_rows(functions, launches, chunk, bases, stream, parameters, pointers):  # type: ignore[no-untyped-def]
    """The launches of a chunk, one behind another; the first error code."""
    for at in range(chunk[FIRST_LAUNCH], chunk[FIRST_LAUNCH] + chunk[N_LAUNCHES]):
        row = launches[at]
        for k in range(PARAMETERS):
            parameters[k] = row[ARGUMENTS + k] + bases[(row[RELATIVE] >> (4 * k)) & 15]
        shape = (row[LAUNCH_KERNEL], row[CTAS], 1, 1, row[LAUNCH_THREADS], 1, 1, 0, stream, pointers.ctypes.data, 0)
        code = call(functions[LAUNCH], shape)
        if code:
            return code
    return np.int32(0)


@njit(nogil=True)
def run_chunk(  # type: ignore[no-untyped-def]
    functions, lane, launches, chunk, digest, bases, pitch, stream, parameters, pointers
):
    """The kernels of a chunk: its launches, or the lane's own kernel; the first error code."""
    if chunk[N_LAUNCHES] > 0:
        return _launch_rows(functions, launches, chunk, bases, stream, parameters, pointers)
    return _launch(functions, lane, chunk, digest, bases, pitch, stream, parameters, pointers)


@njit(nogil=True)
def aim_chunk(lane, chunk, at, buffers, works, bases):  # type: ignore[no-untyped-def]
    """Fills in what a chunk's kernels find by its stream, and gives the address that its copies are relative to."""
    base = chunk[INSTEAD]
    if chunk[N_PIECES] > 0 and not base:
        base = buffers[at]
    bases[BUFFER], bases[WORK], bases[COUNTER] = base, works[at], lane[COUNTERS] + COUNTER_BYTES * at
    return base
