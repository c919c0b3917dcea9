"""What the calls of a disk tier share: slabs, what is in them, and what went wrong."""

from __future__ import annotations

import collections
import errno
import threading

import numpy as np

from kvortex.index import BlockIndex
from kvortex.tiers.base import Int64s
from kvortex.tiers.disk.places import Places
from kvortex.tiers.disk.slab import ShortTransferError, Slab
from kvortex.tiers.record import RecordFormat

_QUARANTINE_PART = 16  # at most one slot in so many is kept out of use


class Store:
    """Slots of all slabs as one.

    Attributes
    ----------
    slabs : list of Slab
        All of as many slots.
    settled : threading.Condition
        Told when a reserved key was committed or aborted.
    """

    def __init__(self, slabs: list[Slab], places: Places, index: BlockIndex, form: RecordFormat) -> None:
        self.slabs, self.places, self.index, self.form = slabs, places, index, form
        self.settled = threading.Condition()
        self.unsynced = False  # whether anything was written since the last flush
        self._failures: collections.Counter[str] = collections.Counter()
        self._quarantine: collections.deque[int] = collections.deque()
        self._lock = threading.Lock()

    def where(self, place: int) -> tuple[Slab, int]:
        """The slab of a place, and the offset there."""
        slab = self.slabs[place % len(self.slabs)]
        return slab, slab.offset(place // len(self.slabs))

    def failed(self, cause: str | OSError) -> None:
        """Counts what went wrong."""
        if isinstance(cause, ShortTransferError):
            cause = "short"
        elif isinstance(cause, OSError):
            cause = errno.errorcode.get(cause.errno or 0, "OSError")
        with self._lock:
            self._failures[cause] += 1

    def failures(self) -> dict[str, int]:
        """How often what went wrong, by cause."""
        with self._lock:
            return dict(self._failures)

    def quarantine(self, slots: Int64s) -> None:
        """Keeps slots, which have a pin each and no key any more, out of use; those that were there longest come back.

        So a bad spot of a drive is not met again and again, and errors that pass cost little.
        """
        with self._lock:
            self._quarantine.extend(slots.tolist())
            excess = max(0, len(self._quarantine) - self.places.count // _QUARANTINE_PART)
            back = [self._quarantine.popleft() for _ in range(excess)]
        self.index.release(np.array(back, np.int64))

    def quarantined(self) -> int:
        """Slots that are kept out of use."""
        with self._lock:
            return len(self._quarantine)


def is_bad_spot(error: OSError) -> bool:
    """Whether an error is of the place on disk, and not of the whole disk."""
    return error.errno == errno.EIO and not isinstance(error, ShortTransferError)
