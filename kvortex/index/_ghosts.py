"""Keys that are remembered though their records are not there: what was evicted lately, or offered and not taken.

A bounded table of fingerprints, each in one of a few rings from the oldest to the newest, with a small number beside it. All
in O(1). Of a key 55 bits of hash are kept: two keys that share them are taken for one. That happens to one key in 10^10 or
so of a million that are remembered, and costs nothing but a better or worse place in the eviction order, or an admission too
early; no byte is ever found by a ghost.

A row is 16 bytes (fingerprint and mark, previous, next), and two buckets of 8 find it: 32 bytes for each key that may be
remembered.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvortex.index._atomics import prefetch
from kvortex.index._compiled import compiled
from kvortex.index._hash import ROW_BITS, ROW_MASK, Buckets, home, insert, new_buckets, remove, tag_of
from kvortex.index._memory import zeros
from kvortex.jit import njit

MARK_BITS = 8
MOST_MARK = (1 << MARK_BITS) - 1
_PREV, _NEXT = 2, 3
_USED, _SPARE, _COUNTS = 0, 1, 2  # of head: rows that were ever used, first row that is unused again + 1, lengths of rings


class Ghosts(NamedTuple):
    """Arrays of one table of ghosts; ``rows`` counts them without joints."""

    prints: npt.NDArray[np.int64]  # (rows + rings, 2): fingerprint << 8 | mark
    links: npt.NDArray[np.int32]  # (rows + rings, 4): the same memory; in columns 2 and 3 previous and next
    buckets: Buckets  # (2 x rows,)
    head: npt.NDArray[np.int64]  # (2 + rings,)


def new_ghosts(rows: int, rings: int) -> Ghosts:
    """Room for ``rows`` keys in so many rings."""
    memory = zeros((rows + rings) * 16).reshape(-1, 16)
    links = memory.view(np.int32)
    links[rows:, _PREV] = links[rows:, _NEXT] = np.arange(rows, rows + rings)
    return Ghosts(memory.view(np.int64), links, new_buckets(2 * rows), np.zeros(_COUNTS + rings, np.int64))


@compiled
def length(g: Ghosts, ring: int) -> int:
    """Keys in a ring."""
    return g.head[_COUNTS + ring]  # type: ignore[no-any-return]


@compiled
def prefetch_seek(g: Ghosts, print_: int) -> None:
    """:func:`seek` will soon be asked for this key."""
    prefetch(g.buckets, home(tag_of(print_), g.buckets.size))


@compiled
def seek(g: Ghosts, print_: int) -> int:
    """Row of a key, or -1."""
    buckets, prints, tag = g.buckets, g.prints, tag_of(print_)
    at = home(tag, buckets.size)
    while True:
        entry = buckets[at]
        if entry == 0:
            return -1
        if entry >> ROW_BITS == tag:
            row = np.int64((entry & ROW_MASK) - 1)
            if prints[row, 0] >> MARK_BITS == print_:
                return row  # type: ignore[return-value]
        at += 1
        if at == buckets.size:
            at = 0


@compiled
def mark_of(g: Ghosts, row: int) -> int:
    """The number that a key was given."""
    return g.prints[row, 0] & MOST_MARK  # type: ignore[no-any-return]


@compiled
def add(g: Ghosts, ring: int, print_: int, mark: int) -> None:
    """Remembers a key that is not here, as the newest of a ring; there must be room."""
    head, prints, links = g.head, g.prints, g.links
    row = head[_SPARE] - 1
    if row >= 0:
        head[_SPARE] = links[row, _NEXT]
    else:
        row = head[_USED]
        head[_USED] += 1
    joint = links.shape[0] - (head.size - _COUNTS) + ring
    newest = links[joint, _PREV]
    prints[row, 0] = (print_ << MARK_BITS) | mark
    links[row, _PREV] = newest
    links[row, _NEXT] = joint
    links[newest, _NEXT] = row
    links[joint, _PREV] = row
    head[_COUNTS + ring] += 1
    insert(g.buckets, tag_of(print_), row)


@compiled
def take(g: Ghosts, ring: int, row: int) -> None:
    """Forgets the key of a row, which is in this ring."""
    head, prints, links = g.head, g.prints, g.links
    remove(g.buckets, tag_of(prints[row, 0] >> MARK_BITS), row)
    before, after = links[row, _PREV], links[row, _NEXT]
    links[before, _NEXT] = after
    links[after, _PREV] = before
    links[row, _NEXT] = head[_SPARE]
    head[_SPARE] = row + 1
    head[_COUNTS + ring] -= 1


@compiled
def take_oldest(g: Ghosts, ring: int) -> None:
    """Forgets the oldest key of a ring, which must not be empty."""
    joint = g.links.shape[0] - (g.head.size - _COUNTS) + ring
    row = int(g.links[joint, _NEXT])
    after = int(g.links[row, _NEXT])  # goes next, most likely
    prefetch_seek(g, g.prints[after, 0] >> MARK_BITS)
    prefetch(g.links, int(g.links[after, _NEXT]))
    take(g, ring, row)


@njit(nogil=True)
def is_whole(g: Ghosts) -> bool:
    """Whether rings, lengths and buckets agree. O(rows)."""
    prints, links, buckets, head = g.prints, g.links, g.buckets, g.head
    rings = head.size - _COUNTS
    rows = links.shape[0] - rings
    seen = np.zeros(rows, np.bool_)
    total = 0
    for ring in range(rings):
        at, joint, count = rows + ring, rows + ring, 0
        while True:
            after = np.int64(links[at, _NEXT])
            if after < 0 or after >= links.shape[0] or links[after, _PREV] != at:
                return False
            at = after
            if at == joint:
                break
            if at >= rows or seen[at] or seek(g, prints[at, 0] >> MARK_BITS) != at:
                return False
            seen[at] = True
            count += 1
        if count != head[_COUNTS + ring]:
            return False
        total += count
    return total == np.count_nonzero(buckets) and head[_USED] <= rows  # type: ignore[no-any-return]


def listing(g: Ghosts, ring: int) -> list[tuple[int, int]]:
    """(fingerprint, mark) of the keys in a ring, the oldest first. For tests."""
    joint = len(g.links) - (g.head.size - _COUNTS) + ring
    found, at = [], int(g.links[joint, _NEXT])
    while at != joint:
        found.append((int(g.prints[at, 0]) >> MARK_BITS, int(g.prints[at, 0]) & MOST_MARK))
        at = int(g.links[at, _NEXT])
    return found
