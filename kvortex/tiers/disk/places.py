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


class Places:
    """All arrays have a row for each of ``count`` places; place ``p`` is slot ``p // slabs`` of slab ``p % slabs``.

    Attributes
    ----------
    keys : (count, 32) uint8
        Of the record that was read or written there last, or is being written.
    sizes : (count,) int64
        Bytes of its payload.
    generations : (count,) uint64
    before : (count,) uint64
        The first 8 bytes of the key of what else may still be there, ``ANY`` where that may be anything.
    of_slot : (count,) int64
        The place of each slot of the index.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.keys = np.zeros((count, 32), np.uint8)
        self.sizes = np.zeros(count, np.int64)
        self.generations = np.zeros(count, np.uint64)
        self.before = np.zeros(count, np.uint64)
        self.of_slot = np.arange(count)
        self._marks = self.keys.view(np.uint64)[:, 0]
        self._generation = 1
        self._lock = threading.Lock()

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

    def begin(self, place: int, key: KeyArray, size: int, generation: int) -> None:
        """A record is about to be written; what was there may outlive that.

        ``before`` first: a search that runs beside this, which looks at ``keys`` first, sees the old key in one of them.
        """
        self.before[place] = self._marks[place] if self.before[place] == NOTHING else ANY
        self.keys[place] = key
        self.sizes[place], self.generations[place] = size, generation

    def wrote(self, place: int) -> None:
        """It was written as a whole: nothing else is there."""
        self.before[place] = NOTHING

    def unsure(self, place: int) -> None:
        """It was not: anything may be there."""
        self.before[place] = ANY

    def holding(self, keys: KeyArray) -> Int64s:
        """Places whose header on disk may be that of one of the keys."""
        wanted = np.ascontiguousarray(keys).view(np.uint64)[:, 0]
        found = np.isin(self._marks, wanted)
        found |= np.isin(self.before, wanted) | (self.before == ANY)
        return np.flatnonzero(found)

    def erased(self, places: Int64s, generations: npt.NDArray[np.uint64]) -> None:
        """Headers there were overwritten with zeros; not counting what was begun since there were these generations."""
        same = self.generations[places] == generations
        self.before[places[same]] = NOTHING
