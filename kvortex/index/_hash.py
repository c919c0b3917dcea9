"""Open addressing over 32-byte keys: linear probing, and deletion that shifts entries back, so there are no tombstones.

A bucket is one int64: 31 bits of the key's hash above ``row + 1``, or 0 where it is empty. There are at least twice as many
buckets as rows, so at most half are full and every probe ends at an empty one. A probe reads neighbouring buckets, eight to
a cache line, and goes to a row only where the hash agrees; and since a search starts where those same bits say, deletion
needs no key. Deletion is Knuth's algorithm R (The Art of Computer Programming, volume 3, section 6.4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.index._atomics import load, load_item, prefetch, store_item
from kvortex.index._compiled import compiled
from kvortex.index._lines import Words
from kvortex.index._memory import zeros

# Numba makes float64 of uint64 mixed with a signed integer, so every operand of the hash is a uint64 by name.
_START = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(0xD6E8FEB86659FD93)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(32)
_FOLD = np.uint64(33)
_TOP = np.uint64(9)

PRINT_BITS = 55
_TAG_BITS, ROW_BITS = 31, 32
_TAG_SHIFT = PRINT_BITS - _TAG_BITS
ROW_MASK = (1 << ROW_BITS) - 1

Buckets = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]


def new_buckets(count: int) -> Buckets:
    """So many empty buckets, at least twice as many as there can be rows, or 2."""
    return zeros(max(count, 2) * 8).view(np.int64)


@compiled
def fingerprint(words: Words, row: int) -> int:
    """55 bits of a hash of ``words[row]``, of which the first four words are the key.

    Keys may come from a caller who counts in one word or even one byte of it. A product carries differences upwards
    only, so each word's high half is folded down, and MurmurHash3's 64-bit finaliser closes.
    """
    h = _START
    for j in range(4):
        h = (h ^ np.uint64(words[row, j])) * _WORD
        h ^= h >> _HALF
    h ^= h >> _FOLD
    h *= _MIX1
    h ^= h >> _FOLD
    h *= _MIX2
    h ^= h >> _FOLD
    # int() would leave it unsigned in Numba, and every sum with it a float.
    return np.int64(h >> _TOP)  # type: ignore[return-value]


@compiled
def tag_of(print_: int) -> int:
    """The part of a fingerprint that a bucket holds."""
    return print_ >> _TAG_SHIFT


@compiled
def home(tag: int, buckets: int) -> int:
    """Where the search for a tag starts in so many buckets."""
    return (tag * buckets) >> _TAG_BITS


@compiled
def same(a: Words, i: int, b: Words, j: int) -> bool:
    """Whether row ``i`` of ``a`` and row ``j`` of ``b`` are one key."""
    return a[i, 0] == b[j, 0] and a[i, 1] == b[j, 1] and a[i, 2] == b[j, 2] and a[i, 3] == b[j, 3]  # type: ignore[no-any-return]


@compiled
def find(buckets: Buckets, lines: Words, tag: int, keys: Words, row: int) -> int:
    """Line whose key is ``keys[row]``, or -1. Reserved slots are found too."""
    at = home(tag, buckets.size)
    while True:
        entry = buckets[at]
        if entry == 0:
            return -1
        if entry >> ROW_BITS == tag:
            slot = int((entry & ROW_MASK) - 1)
            if same(lines, slot, keys, row):
                return slot
        at += 1
        if at == buckets.size:
            at = 0


GROUP = 32  # keys whose cache lines are on their way at once


@compiled
def find_group(buckets: Buckets, lines: Words, keys: Words, row: int, prints: Numbers, slots: Numbers, at: int) -> int:
    """:func:`find` for up to ``GROUP`` keys from ``keys[row]`` on; how many.

    Fingerprints and lines (or -1) go to ``prints`` and ``slots`` from ``at`` on. All buckets are on their way before the first
    is read, and all lines before the first key is compared, so that the group waits about as long as one key would. Others may
    write meanwhile, see _reads: then what is found may be wrong, and the search ends nevertheless.
    """
    count = min(GROUP, keys.shape[0] - row)
    for j in range(count):
        prints[at + j] = fingerprint(keys, row + j)
        prefetch(buckets, home(tag_of(prints[at + j]), buckets.size))
    for j in range(count):
        slots[at + j] = _candidate(buckets, tag_of(prints[at + j]))
        if slots[at + j] >= 0:
            prefetch(lines, slots[at + j])
    for j in range(count):
        slot = slots[at + j]
        if slot >= 0 and not _is_at(lines, slot, keys, row + j):
            slots[at + j] = _find_slowly(buckets, lines, tag_of(prints[at + j]), keys, row + j)
    return count  # type: ignore[no-any-return,unused-ignore]


@compiled
def _candidate(buckets: Buckets, tag: int) -> int:
    """First line whose bucket has the tag, or -1."""
    at = home(tag, buckets.size)
    for _ in range(buckets.size):
        entry = load_item(buckets, at)
        if entry == 0:
            return -1
        if entry >> ROW_BITS == tag:
            return int((entry & ROW_MASK) - 1)
        at += 1
        if at == buckets.size:
            at = 0
    return -1


@compiled
def _find_slowly(buckets: Buckets, lines: Words, tag: int, keys: Words, row: int) -> int:
    """:func:`find`, while others may write."""
    at = home(tag, buckets.size)
    for _ in range(buckets.size):
        entry = load_item(buckets, at)
        if entry == 0:
            return -1
        slot = int((entry & ROW_MASK) - 1)
        if entry >> ROW_BITS == tag and _is_at(lines, slot, keys, row):
            return slot
        at += 1
        if at == buckets.size:
            at = 0
    return -1


@compiled
def _is_at(lines: Words, slot: int, keys: Words, row: int) -> bool:
    """Whether a line's key is ``keys[row]``, while others may write."""
    for j in range(4):  # noqa: SIM110 - compiled
        if load(lines, slot, j) != keys[row, j]:
            return False
    return True


@compiled
def insert(buckets: Buckets, tag: int, row: int) -> None:
    """Enter a row, which must not be in the table."""
    at = home(tag, buckets.size)
    while buckets[at] != 0:
        at += 1
        if at == buckets.size:
            at = 0
    store_item(buckets, at, (tag << ROW_BITS) | (row + 1))


@compiled
def remove(buckets: Buckets, tag: int, row: int) -> None:
    """Take out a row, which must be in the table, and move later entries of its run back to close the gap."""
    count = buckets.size
    hole, entry = home(tag, count), (tag << ROW_BITS) | (row + 1)
    while buckets[hole] != entry:
        hole += 1
        if hole == count:
            hole = 0
    at = hole
    while True:
        at += 1
        if at == count:
            at = 0
        moved = buckets[at]
        if moved == 0:
            break
        # An entry may move into the hole unless its search starts behind the hole: it would no longer be found.
        start = home(moved >> ROW_BITS, count)
        if _distance(start, at, count) >= _distance(hole, at, count):
            store_item(buckets, hole, moved)
            hole = at
    store_item(buckets, hole, 0)


@compiled
def _distance(start: int, at: int, count: int) -> int:
    """Steps from one bucket on to another."""
    return at - start if at >= start else at - start + count


def scratch(keys: int) -> tuple[Numbers, Rows]:
    """Fingerprints of so many keys, and a table to look for repeated ones in, with a power of two of rows."""
    return np.empty(keys, np.int64), np.zeros(max(4, 1 << (2 * keys - 1).bit_length()), np.int32)


@compiled
def repeated(keys: Words, prints: Numbers, rows: Rows) -> tuple[int, int]:
    """Two rows that are the same key, or (-1, -1); O(n) by ``rows``, a table of row + 1 that is all 0."""
    size = rows.size
    for i in range(keys.shape[0]):
        at = prints[i] & (size - 1)
        while rows[at] != 0:
            row = int(rows[at]) - 1
            if same(keys, row, keys, i):
                return row, i
            at = (at + 1) & (size - 1)
        rows[at] = i + 1
    return -1, -1


@compiled
def find_all(buckets: Buckets, lines: Words, keys: Words, prints: Numbers, slots: Numbers) -> None:
    """Fill the fingerprints of all keys, and their slots or -1."""
    row = 0
    while row < keys.shape[0]:
        row += find_group(buckets, lines, keys, row, prints, slots, row)
