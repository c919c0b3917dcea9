"""Open addressing over 32-byte keys: linear probing, and deletion that shifts entries back, so there are no tombstones.

A bucket holds ``slot + 1``, or 0 where it is empty; the keys stay in the per-slot array. The table has a power of two
of at least twice as many buckets as slots, so at most half are full and every probe ends at an empty one. Deletion is
Knuth's algorithm R (The Art of Computer Programming, volume 3, section 6.4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

# Numba makes float64 of uint64 mixed with a signed integer, so every operand of the hash is a uint64 by name.
_START = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(0xD6E8FEB86659FD93)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(32)
_FOLD = np.uint64(33)

Words = npt.NDArray[np.uint64]
Buckets = npt.NDArray[np.int32]


@njit(nogil=True, cache=True)
def bucket_count(entries: int) -> int:
    """Smallest power of two that is at least twice ``entries``, and at least 2."""
    count = 2
    while count < 2 * entries:
        count *= 2
    return count


@njit(nogil=True, cache=True)
def home(words: Words, row: int, mask: int) -> int:
    """Bucket where the search for ``words[row]`` (four uint64 words) starts.

    Keys may come from a caller who counts in one word or even one byte of it. A product carries differences upwards
    only, so each word's high half is folded down, and MurmurHash3's 64-bit finaliser closes.
    """
    h = _START
    for j in range(4):
        h = (h ^ words[row, j]) * _WORD
        h ^= h >> _HALF
    h ^= h >> _FOLD
    h *= _MIX1
    h ^= h >> _FOLD
    h *= _MIX2
    h ^= h >> _FOLD
    # int() would leave it unsigned in Numba, and every sum with it a float.
    return np.int64(h & np.uint64(mask))  # type: ignore[return-value,no-any-return,unused-ignore]


@njit(nogil=True, cache=True)
def same(a: Words, i: int, b: Words, j: int) -> bool:
    """Whether row ``i`` of ``a`` and row ``j`` of ``b`` are one key."""
    return a[i, 0] == b[j, 0] and a[i, 1] == b[j, 1] and a[i, 2] == b[j, 2] and a[i, 3] == b[j, 3]  # type: ignore[no-any-return]


@njit(nogil=True, cache=True)
def find(buckets: Buckets, keys: Words, words: Words, row: int) -> int:
    """Row of ``keys`` that equals ``words[row]``, or -1. Reserved slots are found too."""
    mask = buckets.size - 1
    at = home(words, row, mask)
    while True:
        slot = int(buckets[at]) - 1
        if slot < 0 or same(keys, slot, words, row):
            return slot
        at = (at + 1) & mask


@njit(nogil=True, cache=True)
def insert(buckets: Buckets, keys: Words, slot: int) -> None:
    """Enter ``keys[slot]``, which must not be in the table."""
    mask = buckets.size - 1
    at = home(keys, slot, mask)
    while buckets[at] != 0:
        at = (at + 1) & mask
    buckets[at] = slot + 1


@njit(nogil=True, cache=True)
def remove(buckets: Buckets, keys: Words, slot: int) -> None:
    """Take out ``keys[slot]``, which must be in the table, and move later entries of its run back to close the gap."""
    mask = buckets.size - 1
    hole = home(keys, slot, mask)
    while buckets[hole] != slot + 1:
        hole = (hole + 1) & mask
    at = hole
    while True:
        at = (at + 1) & mask
        if buckets[at] == 0:
            break
        # An entry may move into the hole unless its search starts behind the hole: it would no longer be found.
        start = home(keys, int(buckets[at]) - 1, mask)
        if ((at - start) & mask) >= ((at - hole) & mask):
            buckets[hole] = buckets[at]
            hole = at
    buckets[hole] = 0
