"""What a load in groups of layers looks up in records that wait in slots, compiled: a model's first token waits for it."""

from __future__ import annotations

import functools

import numpy as np

from kvortex.jit import njit
from kvortex.kernels.plane_form import MOST_TAIL, RAW_TAIL, RAW_TILE, VALUES

_AHEAD, _LINE = 32, 16  # records, and words of a line of a cache


@njit(nogil=True, inline="always")
def _any_tails(words, table, first, end):  # type: ignore[no-untyped-def]
    """Bytes of the tails of some tiles; entries that no tile has count as none, and are told where they are decoded."""
    size = np.uint32(0)
    for tile in range(np.uint64(first), np.uint64(end)):  # unsigned, or there are no vectors of it
        word = words[table + tile]
        count, escapes = word & np.uint32(0xFFFF), word >> np.uint32(16)
        tail = np.uint32(12) * ((count + np.uint32(31)) >> np.uint32(5))
        tail += (escapes + np.uint32(3)) & np.uint32(0xFFFFFFFC)
        bad = (count > np.uint32(VALUES)) | (escapes > count) | (tail > np.uint32(MOST_TAIL))
        tail = np.uint32(0) if bad else tail
        size += np.uint32(RAW_TAIL) if word == np.uint32(RAW_TILE) else tail
    return size


@njit(nogil=True, inline="always")
def _coded_tails(words, table, first, end):  # type: ignore[no-untyped-def]
    """The same where all tiles are coded, and whether they are: in two thirds of the time."""
    size, values, wrong, longest = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for tile in range(np.uint64(first), np.uint64(end)):
        word = words[table + tile]
        count = np.uint32(word & np.uint32(0xFFFF))
        both = np.uint32(word + np.uint32(3 << 16 | 31))  # rounded up; of too large a number the other is wrong, too
        groups = np.uint32((both >> np.uint32(5)) & np.uint32(0x7FF))
        tail = np.uint32(np.uint32(groups + np.uint32(groups + groups)) + np.uint32(both >> np.uint32(18)))  # words
        values, longest = max(values, count), max(longest, tail)
        wrong |= np.uint32(count - np.uint32(word >> np.uint32(16)))  # its sign
        size = np.uint32(size + tail)
    good = (values <= np.uint32(VALUES)) & (longest <= np.uint32(MOST_TAIL // 4)) & (wrong >> np.uint32(31) == 0)
    return np.uint32(size << np.uint32(2)), good


@njit(nogil=True)
def _tails(words, table, first, end):  # type: ignore[no-untyped-def]
    size, good = _coded_tails(words, table, first, end)
    return size if good else np.uint32(_any_tails(words, table, first, end))


@njit(nogil=True)
def tail_offsets(words, slot_words, slots, table_at, used_at, tiles, edges, most, offsets):  # type: ignore[no-untyped-def]
    """Where in records of the plane code the tails of some tiles begin, as their tables say, and end, as their headers do.

    A decoder takes no record whose table and header differ. So the last tiles' entries need not be looked at to know where
    their tails end; and where these begin is told from there, if that are fewer entries than from the front.

    Parameters
    ----------
    words : (w,) uint32
        All slots, which nobody writes.
    slot_words : int
        From one slot to the next.
    slots : (n,) int64
    table_at, used_at : int
        Words of a record that its table begins with, and its length, which has two.
    tiles : int
        Of a record.
    edges : (g,) int64
        Tiles, ascending; the last may be the number of tiles, for where tails end.
    most : int
        Bytes of a slot: what is damaged leads no further.
    offsets : (n, g) int64
        Bytes. Has the first column, and gets the others, which do not descend within a record.

    Returns
    -------
    int
        A number that means nothing: so that no compiler leaves out what made it.
    """
    seen, count, last = np.uint32(0), len(edges), len(edges) - 1
    to_end = edges[last] == tiles
    back = to_end and count > 2 and tiles - edges[count - 2] < edges[count - 2] - edges[count - 3]
    summed = count - int(to_end) - int(back)  # edges that are told from the front
    for begin in range(0, len(slots), _AHEAD):
        end = min(begin + _AHEAD, len(slots))
        # Tables lie far apart, and sums wait for each line of them. Asked for one line behind another many are on their way at
        # a time: with cold caches 1.0 ms instead of 2.1 for a sixth of the tables of 2,047 records of Llama-3-8B's shape.
        for b in range(begin, end):
            record = np.uint64(slots[b] * slot_words)
            table = record + np.uint64(table_at)
            if to_end:
                seen ^= words[record + np.uint64(used_at)]
            for tile in range(np.uint64(edges[0]), np.uint64(edges[summed - 1]), np.uint64(_LINE)):
                seen ^= words[table + tile]
            if back:
                for tile in range(np.uint64(edges[count - 2]), np.uint64(tiles), np.uint64(_LINE)):
                    seen ^= words[table + tile]
        for b in range(begin, end):
            record, at = np.uint64(slots[b] * slot_words), offsets[b, 0]
            table = record + np.uint64(table_at)
            for g in range(1, summed):
                at = min(at + np.int64(_tails(words, table, edges[g - 1], edges[g])), most)
                offsets[b, g] = at
            if to_end:
                low, high = words[record + np.uint64(used_at)], words[record + np.uint64(used_at + 1)]
                offsets[b, last] = used = max(at, most if high else min(np.int64(low), most))
                if back:
                    offsets[b, count - 2] = max(at, used - np.int64(_tails(words, table, edges[count - 2], tiles)))
    return seen


@functools.cache
def load_compiled() -> None:
    """Loads the function, or compiles it: not in the middle of the first transfer."""
    words, none = np.zeros(1, np.uint32), np.empty(0, np.int64)
    words.flags.writeable = False
    tail_offsets(words, 1, none, 0, 0, 1, np.zeros(1, np.int64), 0, np.empty((0, 1), np.int64))
