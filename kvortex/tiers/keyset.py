"""A bounded set of keys that forgets: what was seen lately, and no proof of anything."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvortex.errors import ArgumentError, PoolFullError
from kvortex.index import NEW, BlockIndex
from kvortex.keys import KeyArray

Flags = npt.NDArray[np.bool_]


class KeySet:
    """Keys that were added within the last ``lifetime_s`` seconds, or at least half of that; the newest ``capacity`` of them.

    Two tables of an index (whole batches in compiled calls): keys go into the younger, and are looked for in both. After half
    a lifetime the younger becomes the older, whose keys are forgotten. Thread-safe. An interrupt in the middle of a call may
    lose keys, until their table has gone.

    Parameters
    ----------
    capacity
        Keys in one table, of 100 bytes each.
    lifetime_s
        Infinite for keys that are only forgotten for want of room.
    clock
    """

    def __init__(self, capacity: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity, self._half, self._clock = capacity, lifetime_s / 2, clock
        self._tables: tuple[BlockIndex, BlockIndex | None] = (BlockIndex(capacity), None)
        self._turned = clock()

    def _fresh(self) -> tuple[BlockIndex, BlockIndex | None]:
        turned = self._turned  # read once, lest two threads that find it due count it twice
        age = self._clock() - turned
        if age >= self._half:
            late = age >= 2 * self._half
            older = None if late else self._tables[0]
            # From when it was due, and not from now: what is in it may be as old as that.
            self._tables, self._turned = (BlockIndex(self._capacity), older), turned + (age if late else self._half)
        return self._tables

    def add(self, keys: KeyArray) -> None:
        """All of them; a key that was there is as young as the others."""
        table = self._fresh()[0]
        for first in range(0, len(keys), self._capacity):
            part = keys[first : first + self._capacity]
            with contextlib.suppress(PoolFullError):  # others are adding as many as there is room for
                try:
                    found = table.reserve(part)
                except ArgumentError:  # a key stands twice
                    found = table.reserve(np.unique(part, axis=0))
                table.commit(found.slots[found.status == NEW])

    def lookup(self, keys: KeyArray) -> Flags:
        """(n,) bool."""
        younger, older = self._fresh()
        found = younger.lookup(keys)
        return found if older is None or found.all() else found | older.lookup(keys)

    def drop(self, keys: KeyArray) -> None:
        """Forgets keys."""
        for table in self._tables:
            if table is not None:
                table.drop(keys)

    def __len__(self) -> int:
        return sum(table.counts().resident for table in self._tables if table is not None)
