"""Records that must not come back: forgotten in memory, and their headers overwritten on disk, wherever they may be."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Int64s, Outcome, Outcomes
from kvortex.tiers.disk.crew import Crew
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.places import marks_of
from kvortex.tiers.disk.store import Store

_LOOK = 0.05  # seconds between looks at places where somebody else is writing
Flags = npt.NDArray[np.bool_]


def forget(store: Store, crew: Crew, keys: KeyArray, call: Call) -> Outcomes:
    """:meth:`kvortex.tiers.Tier.delete`. What is not ``OK`` or ``MISS`` is not found any more, and may be after a restart.

    The headers of all places that may hold one of the keys are overwritten, evicted records among them; where another record is
    just being written over one, that is waited for. All slabs are flushed: a drive might otherwise forget, with its
    power, what was written over a record a second ago.
    """
    n = len(keys)
    outcomes = np.full(n, Outcome.FAILED, np.uint8)
    slots, once = np.full(n, -1), np.zeros(1, np.uint8)
    try:
        store.index.acquire(keys, taken=slots)
        there = slots >= 0
        store.index.drop(keys)
        why = _erase(store, crew, keys, call) or _sync(store, crew, call)
        outcomes[:] = np.where(there, Outcome.OK, Outcome.MISS) if why == Outcome.OK else why
    finally:
        store.index.release(slots, once=once)
    return outcomes


def _erase(store: Store, crew: Crew, keys: KeyArray, call: Call) -> Outcome:
    """Headers of all places that may hold one of the keys; ``OK`` where none of them is left."""
    places, places_left = store.places, store.places.holding(keys)
    marks, failed = frozenset(marks_of(keys).tolist()), list[int]()

    while len(places_left):
        asked, busy = places_left, np.zeros(len(places_left), np.bool_)

        def step(at: int, pages: Pages, asked: Int64s = asked, busy: Flags = busy) -> None:
            place = int(asked[at])
            mine = places.begin_erasing(place, marks)
            if not mine:
                busy[at] = mine is False
                return
            slab, offset = store.where(place)
            whole = False
            try:
                slab.erase(offset, pages)
                whole = True
            except OSError as error:
                store.failed(error)
                failed.append(place)
            finally:
                places.end(place, whole=whole, erased=True)

        _, why = crew.run(step, len(asked), call)
        if why != Outcome.OK or failed:
            return Outcome.FAILED if failed else why
        if busy.any():
            places.wait(min(_LOOK, call.left()))
        places_left = np.intersect1d(asked[busy], places.holding(keys))
    return Outcome.OK


def _sync(store: Store, crew: Crew, call: Call) -> Outcome:
    """Flushes every slab; ``OK`` where all went."""
    synced = np.zeros(len(store.slabs), np.bool_)

    def step(at: int, pages: Pages) -> None:
        try:
            store.slabs[at].sync()
            synced[at] = True
        except OSError as error:
            store.failed(error)

    _, why = crew.run(step, len(store.slabs), call)
    return why if why != Outcome.OK or synced.all() else Outcome.FAILED
