"""Records from disk into memory: pinned while they are read, and checked before anybody is told of them."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from kvortex.digests import digest_records
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Fetched, Int64s, Outcome
from kvortex.tiers.disk.crew import Crew
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
        gone, bad = np.zeros(n, np.bool_), np.zeros(n, np.bool_)

        def step(at: int, pages: Pages) -> None:
            row = rows[at]
            _read(store, int(places[row]), keys[row], int(addresses[row]), pages, found, row, gone, bad)

        begun, why = crew.run(step, len(rows), call)
        found.outcomes[rows[begun:]] = why
        if gone.any():
            store.index.drop(keys[gone])
            held = slots[bad]
            slots[bad] = -1  # these pins are the quarantine's
            store.quarantine(held)
    finally:
        store.index.release(slots, once=once)
    return found


def _read(
    store: Store,
    place: int,
    key: KeyArray,
    address: int,
    pages: Pages,
    found: Fetched,
    row: int,
    gone: npt.NDArray[np.bool_],
    bad: npt.NDArray[np.bool_],
) -> None:
    """One record; ``gone`` if it is not to be looked for again, ``bad`` if nothing is to be written there either."""
    size = int(store.places.sizes[place])
    slab, offset = store.where(place)
    try:
        slab.read(offset, address, size, pages, store.reading)
    except OSError as error:
        store.failed(error)
        found.outcomes[row] = Outcome.FAILED
        bad[row] = is_bad_spot(error)
        gone[row] = error.errno == errno.EIO  # of the whole disk, it may be there again later
        return
    outcome = _checked(store, place, key, address, size, pages)
    found.outcomes[row] = outcome
    if outcome == Outcome.OK:
        found.sizes[row], found.digests[row] = size, pages.headers["digest"][0]
        return
    gone[row] = True
    if outcome == Outcome.CORRUPT:
        store.failed("corrupt")


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
