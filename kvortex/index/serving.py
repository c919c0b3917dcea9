"""Whole requests on an index alone: what an engine asks of it for each one, in one compiled call for many of them.

No bytes move, so what is measured is the policy. ``kvortex replay`` makes the same calls through an engine, one request
after another.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError, IndexStateError
from kvortex.index import core
from kvortex.index._hash import Rows, scratch
from kvortex.index._lines import Words
from kvortex.index._reads import match
from kvortex.index.core import ANY_LENGTH, NEW, OK, Slots, Table
from kvortex.index.table import BlockIndex
from kvortex.jit import njit
from kvortex.keys import KeyArray

Flags = npt.NDArray[np.bool_]


@njit(nogil=True)
def _serve(
    t: Table, words: Words, starts: Slots, stored: Flags, most: int, prints: Slots, rows: Rows, hits: Slots
) -> tuple[int, int]:
    """Fill ``hits``; (OK, 0), or what went wrong and with which request. ``prints`` and ``rows`` do for the longest one."""
    longest = 0
    for request in range(hits.size):
        longest = max(longest, starts[request + 1] - starts[request])
    slots, owners, taken = np.empty(longest, np.int64), np.empty(longest, np.int64), np.empty(longest, np.int64)
    lengths, any_length = np.zeros(longest, np.int64), np.full(longest, ANY_LENGTH)
    status, once = np.empty(longest, np.uint8), np.zeros(1, np.uint8)
    for request in range(hits.size):
        first, count = starts[request], min(starts[request + 1] - starts[request], most)
        keys = words[first : first + count]
        run = 0  # of what is stored without being asked for
        if not stored[request]:
            run = match(t.sequence, t.buckets, t.words, t.shorts, keys)  # nobody writes beside it
        hits[request] = run
        if run > 0:
            held = slots[:run]
            core.acquire(t, keys[:run], any_length[:run], prints, held, True)
            once[0] = 0
            fault, _ = core.release(t, held, once)
            if fault != OK:
                return fault, request
        if run < count:
            rest = count - run
            rows[:] = 0
            fault, _, _ = core.reserve(
                t, keys[run:], lengths[:rest], 0, prints, rows, slots[:rest], status[:rest], owners[:rest], taken[:rest]
            )
            if fault != OK:
                return fault, request
            new = 0
            for i in range(rest):
                if status[i] == NEW:
                    taken[new] = slots[i]
                    new += 1
            once[0] = 0
            fault, _ = core.commit(t, taken[:new], once)
            if fault != OK:
                return fault, request
    return OK, 0


def serve(
    index: BlockIndex, keys: KeyArray, starts: npt.NDArray[np.int64], most: int, stored: Flags | None = None
) -> npt.NDArray[np.int64]:
    """Serves requests one after the other: looks for the leading run of resident keys, uses it, and stores the others.

    Parameters
    ----------
    index
        Nobody else may hold slots of it.
    keys : (n, 32) uint8, C-contiguous
    starts : (r + 1,) int64
        Request ``i`` asks for ``keys[starts[i]:starts[i + 1]]``, all different.
    most
        Of a longer request only so many leading keys are used; the index's capacity at most.
    stored : (r,) bool
        Which are no requests: all of their keys are stored, and hits are 0. None for none.

    Returns
    -------
    (r,) int64
        Hits of each request: how many keys from its first on were resident without a gap when it came.

    Raises
    ------
    ArgumentError
        A request names a key twice. Those before it have been served.
    """
    words, hits = keys.view(np.int64), np.zeros(len(starts) - 1, np.int64)
    flags = np.zeros(len(hits), bool) if stored is None else np.ascontiguousarray(stored)
    prints, rows = scratch(int(np.diff(starts).max(initial=0)))
    with index._lock:
        fault, request = _serve(index._table, words, starts, flags, most, prints, rows, hits)
    if fault == core.DUPLICATE:
        raise ArgumentError(f"request {request} names a key twice")
    if fault != OK:
        raise IndexStateError(f"request {request} could not be served: fault {fault}")
    return hits
