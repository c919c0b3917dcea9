"""Listing the chunks and copies of a layer-wise transfer, compiled: a model's first token waits for it."""

from __future__ import annotations

import functools

import numpy as np

from kvortex.jit import njit
from kvortex.transfer.plan import (
    CHUNK_COLUMNS,
    COPY_BYTES,
    COPY_COLUMNS,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_PIECE,
    HOST_PITCH,
    HOST_SIDE,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_PIECES,
    PITCH,
)


@njit(nogil=True)
def list_sections(  # type: ignore[no-untyped-def]
    slots, per_chunk, segment_slots, address, slot_bytes, first_pieces, offsets, nbytes, pitch
):
    """The same chunks of records for each section, and a copy for each run of slots that are neighbours in one chunk and one
    registration.

    Parameters
    ----------
    slots : (n,) int64
        Ascending.
    per_chunk, segment_slots, address, slot_bytes : int
        Records of a chunk; and of :class:`kvortex.transfer.plan.Pool`.
    first_pieces, offsets, nbytes : (s + 1,), (s,), (s,) int64
        Of :class:`kvortex.transfer.layers.Sections`.
    pitch : int
        From one record to the next in a staging buffer.

    Returns
    -------
    chunks, copies : (s * c, CHUNK_COLUMNS), (s * r, COPY_COLUMNS) int64
    """
    n, sections = len(slots), len(offsets)
    heads = np.empty(n + 1, np.int64)
    runs = 0
    for at in range(n):
        joined = at % per_chunk != 0 and slots[at] == slots[at - 1] + 1
        if not joined or slots[at] // segment_slots != slots[at - 1] // segment_slots:
            heads[runs] = at
            runs += 1
    heads[runs] = n
    count = (n + per_chunk - 1) // per_chunk
    chunks = np.zeros((sections * count, CHUNK_COLUMNS), np.int64)
    copies = np.empty((sections * runs, COPY_COLUMNS), np.int64)
    for section in range(sections):
        run = 0
        for c in range(count):
            row, first = chunks[section * count + c], c * per_chunk
            row[FIRST_BLOCK] = first
            row[N_BLOCKS] = min(n - first, per_chunk)
            row[FIRST_PIECE] = first_pieces[section]
            row[N_PIECES] = first_pieces[section + 1] - first_pieces[section]
            row[FIRST_COPY] = section * runs + run
            while run < runs and heads[run] < first + per_chunk:
                copy = copies[section * runs + run]
                copy[DEVICE_SIDE] = (heads[run] - first) * pitch
                copy[HOST_SIDE] = address + slots[heads[run]] * slot_bytes + offsets[section]
                copy[COPY_BYTES] = nbytes[section]
                copy[LINES] = heads[run + 1] - heads[run]
                copy[PITCH], copy[HOST_PITCH] = pitch, slot_bytes
                run += 1
            row[N_COPIES] = section * runs + run - row[FIRST_COPY]
    return chunks, copies


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process: an interrupt in the middle of that can abort the process inside LLVM."""
    one = np.zeros(1, np.int64)
    list_sections(one, 1, 1, 0, 1, np.zeros(2, np.int64), one, one, 1)
