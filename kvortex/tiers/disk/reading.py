"""Records from disk into memory: pinned while they are read, and checked before anybody is told of them."""

from __future__ import annotations

import errno

import numpy as np

from kvortex.digests import digest_records
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Fetched, Int64s, Outcome
from kvortex.tiers.disk.crew import Crew, RefusedError, Turn
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.store import Store, is_bad_spot
from kvortex.tiers.record import CHECKED_BYTES


def fetch(store: Store, crew: Crew, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
    """:meth:`kvortex.tiers.Tier.get_into`."""
    n = len(keys)
    found = Fetched(np.full(n, Outcome.MISS, np.uint8), np.zeros(n, np.int64), np.zeros((n, 16), np.uint8))
    slots, once = np.full(n, -1), np.zeros(1, np.uint8)
    try:
        store.index.acquire(keys, taken=slots)
        places = store.places.of_slot[slots]
        rows = np.flatnonzero((slots >= 0) & (store.places.sizes[places] <= room))
        reading = Reading(store, keys, addresses, rows, places[rows], found)
        begun, why = crew.run(reading.step, len(rows), call)
        found.outcomes[rows[begun:]] = why
        if reading.gone.any():
            store.index.drop(keys[reading.gone])
            held = slots[reading.bad]
            slots[reading.bad] = -1  # these pins are the quarantine's
            store.quarantine(held)
    finally:
        store.index.release(slots, once=once)
    return found


class Reading:
    """The steps of one call.

    Parameters
    ----------
    rows, places : (m,) int64
        Of keys that are read, and where their records lie.
    found
        Is told of each record when it was checked, not before.

    Attributes
    ----------
    gone, bad : (n,) bool
        Keys that are not to be looked for again, and those where nothing is to be written either.
    """

    def __init__(
        self, store: Store, keys: KeyArray, addresses: Int64s, rows: Int64s, places: Int64s, found: Fetched
    ) -> None:
        self._store, self._keys, self._found = store, keys, found
        self._rows, self._places, self._addresses = rows.tolist(), places.tolist(), addresses[rows].tolist()
        self._sizes = store.places.sizes[places].tolist()
        self.gone, self.bad = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.bool_)

    def step(self, at: int, pages: Pages) -> Turn:
        """One record."""
        place, address, size = self._places[at], self._addresses[at], self._sizes[at]
        slab, offset = self._store.where(place)

        def after(turn: Turn) -> None:
            row = self._rows[at]
            try:
                slab.came(turn.done(), address, size, pages)
            except OSError as error:
                self._failed(row, error)
            except RefusedError as refused:
                self._found.outcomes[row] = refused.why
            else:
                self._tell(row, _checked(self._store, place, self._keys[row], address, size, pages), size, pages)

        return Turn(slab.to_read(offset, address, size, pages), after)

    def _failed(self, row: int, error: OSError) -> None:
        self._store.failed(error)
        self._found.outcomes[row] = Outcome.FAILED
        self.bad[row] = is_bad_spot(error)
        self.gone[row] = error.errno == errno.EIO  # of the whole disk, it may be there again later

    def _tell(self, row: int, outcome: Outcome, size: int, pages: Pages) -> None:
        self._found.outcomes[row] = outcome
        if outcome == Outcome.OK:
            self._found.sizes[row], self._found.digests[row] = size, pages.headers["digest"][0]
            return
        self.gone[row] = True
        if outcome == Outcome.CORRUPT:
            self._store.failed("corrupt")


def _checked(store: Store, place: int, key: KeyArray, address: int, size: int, pages: Pages) -> Outcome:
    """What was read: what was written there last under this key, or not.

    All of a header is known but the digest, and that is known from the payload: one call digests both.
    """
    start = bytes(pages.header[:CHECKED_BYTES])
    if not any(start):
        return Outcome.MISS  # somebody is just deleting it
    digest, generation = pages.headers["digest"], int(store.places.generations[place])
    if start != store.form.start_of_header(key.tobytes(), size, digest.tobytes(), generation):
        return Outcome.CORRUPT
    found = np.empty((2, 16), np.uint8)
    digest_records(np.array([pages.address, address]), np.array([CHECKED_BYTES, size]), found)
    right = found[0].tobytes() == pages.headers["check"].tobytes() and found[1].tobytes() == digest.tobytes()
    return Outcome.OK if right else Outcome.CORRUPT
