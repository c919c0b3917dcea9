"""Looking for keys while somebody may be writing: readers take no lock, and notice what they should not have seen.

A sequence counter (a *seqlock*): a writer makes it odd before it changes anything that readers look at, and even again behind
that, inside one compiled call, which no exception or interrupt of Python ends in the middle. A reader that finds the same
even number before and after its batch has seen the table as it was at one moment, so the whole batch is atomic. One that
does not looks again, a few times, and then takes the lock, so that none starves. What readers look at is buckets, keys and
states, all read and written by atomic operations of a word; the fences are those of Boehm, "Can seqlocks get along with
programming language memory models?", MSPC 2012. A probe is bounded by the number of buckets, whatever a writer does to them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.devices.native import release
from kvortex.index._atomics import fence_acquire, load, load_item, store_item
from kvortex.index._compiled import compiled
from kvortex.index._hash import GROUP, Buckets, find_group
from kvortex.index._lines import RESIDENT, STATE, Shorts, Words
from kvortex.jit import njit

ATTEMPTS = 3
Sequence = npt.NDArray[np.int64]
Scratch = npt.NDArray[np.int64]
Found = npt.NDArray[np.bool_]


@compiled
def begin_write(sequence: Sequence) -> None:
    """From here on readers may see things half done; the lock is held."""
    store_item(sequence, 0, sequence[0] + 1)
    release()


@compiled
def end_write(sequence: Sequence) -> None:
    """Everything is whole again."""
    release()
    store_item(sequence, 0, sequence[0] + 1)


@njit(nogil=True)
def lookup(sequence: Sequence, buckets: Buckets, words: Words, shorts: Shorts, keys: Words, found: Found) -> bool:
    """Fill ``found`` with which keys are resident; False where writers were too busy, and ``found`` means nothing."""
    prints, slots = np.empty(GROUP, np.int64), np.empty(GROUP, np.int64)
    for _ in range(ATTEMPTS):
        began = load_item(sequence, 0)
        if began & 1:
            return False  # no use in looking before the writer has ended, and the lock knows when that is
        fence_acquire()
        _look(buckets, words, shorts, keys, prints, slots, found)
        fence_acquire()
        if load_item(sequence, 0) == began:
            return True
    return False


@njit(nogil=True)
def match(sequence: Sequence, buckets: Buckets, words: Words, shorts: Shorts, keys: Words) -> int:
    """Length of the leading run of resident keys; -1 where writers were too busy."""
    prints, slots = np.empty(GROUP, np.int64), np.empty(GROUP, np.int64)
    for _ in range(ATTEMPTS):
        began = load_item(sequence, 0)
        if began & 1:
            return -1
        fence_acquire()
        run = _run(buckets, words, shorts, keys, prints, slots)
        fence_acquire()
        if load_item(sequence, 0) == began:
            return run  # type: ignore[no-any-return]
    return -1


@compiled
def _look(
    buckets: Buckets, words: Words, shorts: Shorts, keys: Words, prints: Scratch, slots: Scratch, found: Found
) -> None:
    row = 0
    while row < keys.shape[0]:
        group = find_group(buckets, words, keys, row, prints, slots, 0)
        for j in range(group):
            found[row + j] = slots[j] >= 0 and load(shorts, slots[j], STATE) == RESIDENT
        row += group


@compiled
def _run(buckets: Buckets, words: Words, shorts: Shorts, keys: Words, prints: Scratch, slots: Scratch) -> int:
    row = 0
    while row < keys.shape[0]:
        group = find_group(buckets, words, keys, row, prints, slots, 0)
        for j in range(group):
            if slots[j] < 0 or load(shorts, slots[j], STATE) != RESIDENT:
                return row + j
        row += group
    return row
