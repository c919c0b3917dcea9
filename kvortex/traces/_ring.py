"""Keys on their way from the calls that name them to the thread that writes them: a ring of rows without a lock.

A call is a header row and a row a key. Whoever pushes first takes rows, by moving HEAD, then fills them, and then says so in
``ready`` at the header's place. The one reader takes calls in their order, and stops at one that is not ready. Each is one
compiled step, which no signal and no finaliser can enter, so a call is in the ring as a whole or not at all.

SOURCE: the bounded queue of D. Vyukov (1024cores.net), for records of any length and one reader.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.jit import njit
from kvortex.traces._atomics import compare_and_set, exchange, fetch_add

Rows = npt.NDArray[np.int64]
Marks = npt.NDArray[np.int64]

# Rows ever taken by calls, rows ever given back by the reader, calls refused in all, and since the last that was not. Each
# in a cache line of its own.
HEAD, TAIL, DROPPED, DROPPED_BEFORE = 0, 8, 16, 24
_MARKS = 32
_SHUT = 1 << 62  # more than HEAD ever comes to, and than there is room for
# What a call did; columns of its header row.
CHECK, LOAD, SAVE = 0, 1, 2
COUNT, KIND, TIME, LOST = 0, 1, 2, 3


class Ring(NamedTuple):
    """All arrays of one ring."""

    rows: Rows  # (power of two, 4)
    ready: Marks  # (power of two,): where a header is whole, 1 + the number of rows before it since the beginning
    marks: Marks  # (32,)


def new_ring(rows: int) -> Ring:
    """An empty ring of so many rows, a power of two: 40 bytes a row."""
    return Ring(np.zeros((rows, 4), np.int64), np.zeros(rows, np.int64), np.zeros(_MARKS, np.int64))


@njit(nogil=True)
def push(ring: Ring, words: Rows, kind: int, time: int) -> bool:
    """Appends a call; False, and counted, where the reader is too far behind."""
    rows, ready, marks = ring.rows, ring.ready, ring.marks
    size, need = rows.shape[0], 1 + words.shape[0]
    while True:
        head = fetch_add(marks, HEAD, 0)
        if head - fetch_add(marks, TAIL, 0) + need > size:
            fetch_add(marks, DROPPED, 1)
            fetch_add(marks, DROPPED_BEFORE, 1)
            return False
        if compare_and_set(marks, HEAD, head, head + need):
            break
    at = head & (size - 1)
    rows[at, COUNT], rows[at, KIND], rows[at, TIME] = words.shape[0], kind, time
    rows[at, LOST] = exchange(marks, DROPPED_BEFORE, 0)
    for i in range(words.shape[0]):
        row = (head + 1 + i) & (size - 1)
        for j in range(4):
            rows[row, j] = words[i, j]
    exchange(ready, at, head + 1)
    return True


@njit(nogil=True)
def is_ready(ring: Ring, tail: int) -> bool:
    """Whether the call that begins with that row is there as a whole."""
    return bool(fetch_add(ring.ready, tail & (ring.ready.size - 1), 0) == tail + 1)


@njit(nogil=True)
def give_back(ring: Ring, tail: int) -> None:
    """The reader is done with all rows before that one."""
    exchange(ring.marks, TAIL, tail)


@njit(nogil=True)
def shut(ring: Ring) -> None:
    """Refuses all calls from now on, and counts those that wait with those that it refuses. Once, by the reader."""
    rows, marks = ring.rows, ring.marks
    tail, head = marks[TAIL], exchange(marks, HEAD, _SHUT)
    while tail < head:
        if is_ready(ring, tail):  # else a push is just filling it
            tail += 1 + rows[tail & (rows.shape[0] - 1), COUNT]
            fetch_add(marks, DROPPED, 1)
