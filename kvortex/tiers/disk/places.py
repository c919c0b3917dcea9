"""What lies in each slot on disk, as far as this process knows: in arrays, by *place*, which counts slots over all slabs.

The index says which key is in which of its slots, and ``of_slot`` at which place that slot is. What is not in the index may
still lie on disk: the record of who was evicted, until another is written over it. It is remembered here, since a delete
must find it.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvortex.keys import KeyArray
from kvortex.tiers.base import Int64s

ANY = np.uint64(2**64 - 1)  # of ``before``: nobody knows
NOTHING = np.uint64(0)
_LOOK = 1.0  # seconds between looks at a place that is being erased, should its news ever be missed
_MIX = np.array([[0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93]], np.uint64)
Marks = npt.NDArray[np.uint64]


def marks_of(keys: KeyArray) -> Marks:
    """(n,) uint64 for n keys, odd: two that share one cost a record now and then, never a wrong byte."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 4)
    found: Marks = (words * _MIX).sum(1, np.uint64) | np.uint64(1)
    return found


class Places:
    """All arrays have a row for each of ``count`` places; place ``p`` is slot ``p // slabs`` of slab ``p % slabs``.

    Attributes
    ----------
    keys : (count, 32) uint8
        Of the record that was read or written there last, or is being written.
    sizes : (count,) int64
        Bytes of its payload.
    generations : (count,) uint64
    marks : (count,) uint64
        Of its key; ``NOTHING`` where there is no record.
    before : (count,) uint64
        The mark of what else may still be there, ``NOTHING``, or ``ANY``.
    of_slot : (count,) int64
        The place of each slot of the index.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.keys = np.zeros((count, 32), np.uint8)
        self.sizes = np.zeros(count, np.int64)
        self.generations = np.zeros(count, np.uint64)
        self.marks = np.zeros(count, np.uint64)
        self.before = np.zeros(count, np.uint64)
        self.of_slot = np.arange(count)
        self._lock = threading.Lock()
        self._news, self._waiting = threading.Condition(self._lock), 0  # told when a write of any kind has ended
        self._busy = bytearray(count)  # 1 where somebody is writing
        self._generation = 1

    @property
    def next_generation(self) -> int:
        """What the next record gets."""
        return self._generation

    def go_on_from(self, generation: int) -> None:
        """No record gets a lower generation from now on."""
        self._generation = max(self._generation, generation)

    def new_generations(self, count: int) -> npt.NDArray[np.uint64]:
        """Generations of ``count`` new records."""
        with self._lock:
            first = self._generation
            self._generation += count
        return np.arange(first, first + count, dtype=np.uint64)

    def begin(self, place: int, key: KeyArray, mark: np.uint64, size: int, generation: int) -> None:
        """A record is about to be written by the slot's owner; what was there may outlive that.

        ``before`` first: a search that runs beside this, which looks at ``marks`` first, sees the old one in one of them.
        """
        with self._lock:
            while self._busy[place]:  # what was there is being erased
                self._wait(_LOOK)
            self._busy[place] = 1
        self.before[place] = self.marks[place] if self.before[place] == NOTHING else ANY
        self.marks[place] = mark
        self.keys[place] = key
        self.sizes[place], self.generations[place] = size, generation

    def begin_erasing(self, place: int, marks: frozenset[int]) -> bool | None:
        """The header there is about to be overwritten with zeros: True. False while somebody else is writing there; None where
        nothing of these marks is there any more."""
        with self._lock:
            if self._busy[place]:
                return False
            before = self.before[place]
            if before != ANY and int(before) not in marks and int(self.marks[place]) not in marks:
                return None
            self._busy[place] = 1
            return True

    def end(self, place: int, *, whole: bool, erased: bool = False) -> None:
        """A write of either kind has ended. If it was whole, nothing else is there; else what was there before may be, which
        ``begin`` has put down."""
        if erased and whole:
            self.marks[place] = NOTHING
            self.keys[place] = 0
        if whole:
            self.before[place] = NOTHING
        with self._lock:
            self._busy[place] = 0
            if self._waiting:  # hardly ever, and the disk waits for who ends a write
                self._news.notify_all()

    def wait(self, seconds: float) -> None:
        """Until a write of any kind has ended, or so long."""
        with self._lock:
            self._wait(seconds)

    def _wait(self, seconds: float) -> None:
        self._waiting += 1
        try:
            self._news.wait(seconds)
        finally:
            self._waiting -= 1

    def holding(self, keys: KeyArray) -> Int64s:
        """Places whose header on disk may be that of one of the keys."""
        wanted = marks_of(keys)
        found = np.isin(self.marks, wanted)
        found |= np.isin(self.before, wanted) | (self.before == ANY)
        return np.flatnonzero(found)
