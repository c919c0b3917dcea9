"""What the cascade sees of the pool in RAM: its index, and where each slot lies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.index import BlockIndex
from kvortex.tiers.base import Digests, Int64s


@dataclass
class Room:
    """The pool.

    Parameters
    ----------
    index
    address
        Of slot 0.
    slot_bytes
    digests : (slots, 16) uint8
        Of what is in each slot, kept by whoever fills it; None where nobody keeps them, and they are computed for each write.
    number
        A new number for what reserves slots; see ``owner`` of :meth:`BlockIndex.reserve`.
    held
        Numbers of batches that have slots just now; those of a fetch are its owner's.
    quiet_until
        ``time.monotonic()`` before which no batch takes slots, since somebody else needs them.
    share
        The most that tiers may pin for writing, and again reserve for reading, of all slots; at least one for each thread.
    """

    index: BlockIndex
    address: int
    slot_bytes: int
    digests: Digests | None
    number: Callable[[], int]
    share: float
    held: dict[int, None] = field(default_factory=dict)
    quiet_until: float = 0.0

    def at(self, slots: Int64s) -> Int64s:
        """(n,) int64 addresses."""
        return self.address + slots * self.slot_bytes

    def digests_of(self, slots: Int64s, sizes: Int64s) -> Digests:
        """(n, 16) uint8."""
        if self.digests is not None:
            return np.ascontiguousarray(self.digests[slots])
        found = np.empty((len(slots), DIGEST_BYTES), np.uint8)
        digest_records(self.at(slots), sizes, found)
        return found

    def keep_digests(self, slots: Int64s, digests: Digests) -> None:
        """Of what was just put into slots that are reserved still."""
        if self.digests is not None:
            self.digests[slots] = digests

    def quiet(self) -> float:
        """Seconds for which no batch takes slots."""
        return max(0.0, self.quiet_until - time.monotonic())

    def most_held(self, threads: int) -> int:
        """Slots that one of so many threads may hold."""
        return max(1, int(self.index.ready * self.share) // threads)
