"""Small integers for keys, in bounded memory, and which keys a line of the trace accounts for already.

Keys are numbered in the order of their first appearance. The table forgets by CLOCK: a key that was named again since
the hand last came by is spared once. One that comes back after it was forgotten gets a new number.

SOURCE: F. J. Corbato, "A paging experiment with the Multics system", 1968, for CLOCK.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.index._hash import Buckets, find, fingerprint, insert, new_buckets, remove, tag_of
from kvortex.jit import njit
from kvortex.traces._ring import CHECK, LOAD, Rows

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.uint16]

# Rows of Names.counters.
USED, HAND, NEXT, CALL, LINES, FORGOTTEN, LAST_TIME, LOST_CALLS = 0, 1, 2, 3, 4, 5, 6, 7
# Names.flags: a bit for named again (for the clock), one for asked for by a load and not saved since, and above them the number
# of checks that no load and no save has followed.
_AGAIN, _WANTED, _CHECKED = 1, 2, 4
_MOST_CHECKED = 2**16 - _CHECKED


class Names(NamedTuple):
    """All arrays of a naming; ``capacity`` keys, more than one call can have."""

    keys: Rows  # (capacity, 4)
    buckets: Buckets  # (2 x capacity,)
    numbers: Numbers  # (capacity,)
    calls: Numbers  # (capacity,): the last call that named the key
    flags: Flags  # (capacity,)
    counters: Numbers  # (8,)


def new_names(capacity: int) -> Names:
    """An empty table: 66 bytes a key."""
    return Names(
        np.zeros((capacity, 4), np.int64),
        new_buckets(2 * capacity),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.int64),
        np.zeros(capacity, np.uint16),
        np.zeros(8, np.int64),
    )


@njit(nogil=True)
def name(names: Names, rows: Rows, row: int) -> int:
    """Entry of a key, a new one where it is not known."""
    tag = tag_of(fingerprint(rows, row))
    entry: int = find(names.buckets, names.keys, tag, rows, row)
    if entry >= 0:
        names.flags[entry] |= np.uint16(_AGAIN)
        return entry
    entry = _entry(names)
    for j in range(4):
        names.keys[entry, j] = rows[row, j]
    names.flags[entry], names.calls[entry] = 0, 0
    names.numbers[entry] = names.counters[NEXT]
    names.counters[NEXT] += 1
    insert(names.buckets, tag, entry)
    return entry


@njit(nogil=True)
def _entry(names: Names) -> int:
    """An entry that nothing is in any more; never one that the call of this moment has named."""
    counters, flags = names.counters, names.flags
    if counters[USED] < flags.size:
        counters[USED] += 1
        return int(counters[USED]) - 1
    hand = counters[HAND]
    while flags[hand] & _AGAIN or names.calls[hand] == counters[CALL]:
        flags[hand] &= ~np.uint16(_AGAIN)
        hand = (hand + 1) % flags.size
    counters[HAND] = (hand + 1) % flags.size
    counters[FORGOTTEN] += 1
    remove(names.buckets, tag_of(fingerprint(names.keys, hand)), hand)
    return int(hand)


@njit(nogil=True)
def is_new(names: Names, entry: int, kind: int) -> bool:
    """Whether a key of this call belongs into a line of its own: nothing written so far accounts for it.

    A prompt that is checked, loaded in part and saved for the rest is one request, not three. So is one that is loaded,
    without a check, and saved where it missed. A check accounts for one load or save, since several requests may have been
    checked before the first of them loads; a load, for one save.
    """
    if names.calls[entry] == names.counters[CALL]:
        return False  # twice in one call
    names.calls[entry] = names.counters[CALL]
    flags = names.flags
    if kind == CHECK:
        if flags[entry] < _MOST_CHECKED:
            flags[entry] += np.uint16(_CHECKED)
        return True
    if kind == LOAD:
        flags[entry] |= np.uint16(_WANTED)
    elif flags[entry] & _WANTED:
        flags[entry] &= ~np.uint16(_WANTED)
        return False
    if flags[entry] < _CHECKED:
        return True
    flags[entry] -= np.uint16(_CHECKED)
    return False
