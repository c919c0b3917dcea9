"""Listing the chunks, copies and launches of coded loads in groups of layers, compiled: a model's first token waits for it.

Listed by rows of NumPy calls, the groups behind the first one were issued when that had long crossed the link.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from kvortex.jit import njit
from kvortex.transfer.coded.plans import READ_PIECE
from kvortex.transfer.plan import (
    ARGUMENTS,
    CHUNK_COLUMNS,
    COPY_BYTES,
    COPY_COLUMNS,
    CTAS,
    DEVICE_SIDE,
    FIRST_BLOCK,
    FIRST_COPY,
    FIRST_LAUNCH,
    HOST_PITCH,
    HOST_SIDE,
    LAUNCH_COLUMNS,
    LINES,
    N_BLOCKS,
    N_COPIES,
    N_LAUNCHES,
    N_PIECES,
    PITCH,
    THREADS,
)

# Columns of a strip: bytes of a record, multiples of 16, and where those begin that are digested, up to its end.
BEGIN, END, DIGESTED = range(STRIP_COLUMNS := 3)
# Parameters of kvortex.kernels.coded_read, and those that all decoders share, which differ from chunk to chunk.
_READ_PITCH, _READ_COUNT, _READ_SUMS, _READ_FIRST, _READ_END, _READ_SHIFT = (ARGUMENTS + at for at in (1, 2, 4, 5, 6, 7))
_PITCH, _STATUS, _IDS, _COUNT, _RUN, _TILE, _LAST_TILE, _TAILS = (ARGUMENTS + at for at in (1, 3, 4, 5, 6, 7, 8, 9))
_ALIGNED = 64  # bytes; strips begin and end at multiples of that, as the parts of a record's front do
_WARP = 32


@njit(nogil=True)
def _strips_of(fixed, offsets, g, first, end, done, least, most, strips):  # type: ignore[no-untyped-def]
    """Strips of a group in a chunk of records ``first`` to ``end``; where those end that differ from record to record."""
    strips[:] = fixed[g]
    if offsets.shape[1] == 0:
        return done
    low, high = offsets[first, g], offsets[first, g + 1]
    for b in range(first + 1, end):
        low, high = min(low, offsets[b, g]), max(high, offsets[b, g + 1])
    last = strips[len(strips) - 1]
    last[BEGIN] = max(low & -_ALIGNED, least)
    # An earlier chunk of more records may have got further.
    last[END] = max(min((high + _ALIGNED - 1) & -_ALIGNED, most), done)
    last[DIGESTED] = done
    return last[END]


@njit(nogil=True)
def _pitch_of(strips):  # type: ignore[no-untyped-def]
    pitch = 0
    for k in range(len(strips)):
        pitch += strips[k, END] - strips[k, BEGIN]
    return pitch


@njit(nogil=True)
def pitch_of_all(fixed, offsets, least, most):  # type: ignore[no-untyped-def]
    """Bytes of a record in a staging buffer, in the first group, if all were in one chunk. See :func:`list_groups`."""
    strips = np.empty(fixed.shape[1:], np.int64)
    _strips_of(fixed, offsets, 0, 0, len(offsets), least, least, most, strips)
    return _pitch_of(strips)


@njit(nogil=True)
def part_chunks(fixed, offsets, starts, records, done, least, most, buffer_bytes):  # type: ignore[no-untyped-def]
    """First records of parts of chunks, each of which fits into a staging buffer in every group, and the chunk of each part.

    Parameters are those of :func:`list_groups`; ``records`` are n, ``buffer_bytes`` those of a staging buffer, which holds one.
    """
    strips = np.empty(fixed.shape[1:], np.int64)
    sizes, counts = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
    for c in range(len(starts)):
        end = starts[c + 1] if c + 1 < len(starts) else records
        behind, widest, count = done[c], 1, end - starts[c]
        for g in range(len(fixed)):
            behind = _strips_of(fixed, offsets, g, starts[c], end, behind, least, most, strips)
            widest = max(widest, _pitch_of(strips))
        each = min(max(1, buffer_bytes // widest), count)
        pieces = (count + each - 1) // each
        sizes[c] = (count + pieces - 1) // pieces
        counts[c] = (count + sizes[c] - 1) // sizes[c]
    made, of = np.empty(counts.sum(), np.int64), np.empty(counts.sum(), np.int64)
    at = 0
    for c in range(len(starts)):
        for k in range(counts[c]):
            made[at], of[at] = starts[c] + k * sizes[c], c
            at += 1
    return made, of


@njit(nogil=True)
def _list_copies(slots, breaks, first, end, strips, pitch, pool, copies, at):  # type: ignore[no-untyped-def]
    """A copy of each strip for each run of neighbours; how many copies there are by now, and bytes of these."""
    address, slot_bytes, _ = pool
    nbytes, head = 0, first
    while head < end:
        stop = head + 1
        while stop < end and not breaks[stop]:
            stop += 1
        device = (head - first) * pitch
        for k in range(len(strips)):
            width = strips[k, END] - strips[k, BEGIN]
            if width > 0:
                copy = copies[at]
                copy[DEVICE_SIDE] = device
                copy[HOST_SIDE] = address + slots[head] * slot_bytes + strips[k, BEGIN]
                copy[COPY_BYTES], copy[LINES] = width, stop - head
                copy[PITCH], copy[HOST_PITCH] = pitch, slot_bytes
                nbytes += width * (stop - head)
                at += 1
            device += width
        head = stop
    return at, nbytes


def even_run(tiles: Any, least: int, most: int) -> Any:
    """Tiles that a warp takes at a time, within bounds, where one has so many at most: numbers, or (c,) int64.

    All warps have as many turns: else a part of them has nothing to do in the end.
    """
    turns = np.maximum(-(-tiles // most), 1)
    return np.maximum(-(-tiles // turns), least)


_even_run = njit(nogil=True)(even_run)


@njit(nogil=True)
def _list_launches(rows, varies, first, count, strips, pitch, most_ctas, most_run, launches):  # type: ignore[no-untyped-def]
    """Launches that digest the last strips of a chunk, and one that decodes."""
    reads = len(rows) - 1
    behind = pitch
    for k in range(reads - 1, -1, -1):
        strip, row = strips[len(strips) - reads + k], launches[k]
        row[:] = rows[k]
        behind -= strip[END] - strip[BEGIN]
        row[_READ_PITCH], row[_READ_COUNT], row[_READ_SUMS] = pitch, count, first * rows[k, _READ_SUMS]
        row[_READ_FIRST], row[_READ_END], row[_READ_SHIFT] = strip[DIGESTED], strip[END], strip[BEGIN] - behind
        pieces = count * ((strip[END] - strip[DIGESTED] + READ_PIECE - 1) // READ_PIECE)
        warps = row[THREADS] // _WARP
        row[CTAS] = min(max((pieces + warps - 1) // warps, 1), most_ctas)
    row = launches[reads]
    row[:] = rows[reads]
    tiles, warps = row[_LAST_TILE] - row[_TILE], row[THREADS] // _WARP
    run = _even_run(-(-count * tiles // (warps * most_ctas)), 1, most_run)
    row[CTAS] = min(most_ctas, (count * ((tiles + run - 1) // run) + warps - 1) // warps)
    row[_PITCH], row[_COUNT], row[_RUN] = pitch, count, run
    row[_STATUS], row[_IDS] = first * rows[reads, _STATUS], first * rows[reads, _IDS]
    if varies:
        row[_TAILS] = strips[len(strips) - 1, BEGIN]


@njit(nogil=True)
def list_groups(  # type: ignore[no-untyped-def]
    slots, kept, starts, tail, fixed, offsets, done, least, most, rows, pool, most_ctas, most_run
):
    """The same chunks of records for each group, with their launches, and a copy of each strip for each run of slots that are
    neighbours in one chunk and one registration.

    Parameters
    ----------
    slots : (n,) int64
        Ascending.
    kept : int
        Records of the plan before these.
    starts : (c,) int64
        First records of chunks.
    tail : (t,) int64
        First records of what the last chunk is in the last group, from ``starts[-1]`` on.
    fixed : (g, s, STRIP_COLUMNS) int64
        Strips of each group; of what differs from record to record, the last one, nothing.
    offsets : (n, g + 1) int64
        Where in each record that begins which differs, for each group, and where it ends; (n, 0) where nothing does.
    done : (c,) int64
        Where of that ends what earlier groups have digested.
    least, most : int
        Where that begins at all, and bytes of a record.
    rows : (g, k, LAUNCH_COLUMNS) int64
        Launches of each group for record 1 alone: those which digest the last k - 1 strips, and the one which decodes.
    pool : (int, int, int)
        Of :class:`kvortex.transfer.plan.Pool`.
    most_ctas : int
    most_run : int
        Tiles that a warp takes at a time, at most.

    Returns
    -------
    chunks, copies, launches : (m, CHUNK_COLUMNS), (r, COPY_COLUMNS), (m * k, LAUNCH_COLUMNS) int64
    marks : (g,) int64
        Chunks up to the end of each group.
    done : (c,) int64
        As above, for groups behind these.
    nbytes : int
        Of all copies.
    """
    n, groups, each = len(slots), len(fixed), len(starts)
    count, k = groups * each + len(tail) - 1, rows.shape[1]
    breaks, runs = np.empty(n, np.bool_), 1
    for b in range(1, n):
        breaks[b] = slots[b] != slots[b - 1] + 1 or slots[b] // pool[2] != slots[b - 1] // pool[2]
        runs += breaks[b]
    copies = np.empty(((groups * runs + count) * fixed.shape[1], COPY_COLUMNS), np.int64)  # more than there are
    chunks, launches = np.zeros((count, CHUNK_COLUMNS), np.int64), np.empty((count * k, LAUNCH_COLUMNS), np.int64)
    marks, done, strips = np.empty(groups, np.int64), done.copy(), np.empty(fixed.shape[1:], np.int64)
    at, moved, nbytes = 0, 0, 0
    for g in range(groups):
        for c in range(each):
            stop = starts[c + 1] if c + 1 < each else n
            done[c] = _strips_of(fixed, offsets, g, starts[c], stop, done[c], least, most, strips)
            pitch = _pitch_of(strips)
            cut = g == groups - 1 and c == each - 1
            for part in range(len(tail) if cut else 1):
                first = tail[part] if cut else starts[c]
                end = tail[part + 1] if cut and part + 1 < len(tail) else stop
                chunk = chunks[at]
                chunk[FIRST_BLOCK], chunk[N_BLOCKS], chunk[N_PIECES] = kept + first, end - first, 1
                chunk[FIRST_COPY], chunk[FIRST_LAUNCH], chunk[N_LAUNCHES] = moved, at * k, k
                moved, more = _list_copies(slots, breaks, first, end, strips, pitch, pool, copies, moved)
                chunk[N_COPIES] = moved - chunk[FIRST_COPY]
                mine, varies = launches[at * k : at * k + k], offsets.shape[1] > 0
                _list_launches(rows[g], varies, kept + first, end - first, strips, pitch, most_ctas, most_run, mine)
                nbytes += more
                at += 1
        marks[g] = at
    return chunks, copies[:moved], launches, marks, done, nbytes


@functools.cache
def load_compiled() -> None:
    """Loads what is compiled, once in a process: an interrupt in the middle of that can abort the process inside LLVM."""
    one, offsets = np.zeros(1, np.int64), np.zeros((1, 0), np.int64)
    fixed, rows = np.zeros((1, 1, STRIP_COLUMNS), np.int64), np.full((1, 1, LAUNCH_COLUMNS), _WARP, np.int64)
    pitch_of_all(fixed, offsets, 0, 0)
    part_chunks(fixed, offsets, one, 1, one, 0, 0, 1)
    list_groups(one, 0, one, one, fixed, offsets, one, 0, 0, rows, (0, 1, 1), 1, 1)
