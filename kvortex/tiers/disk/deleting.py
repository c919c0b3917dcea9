"""Records that must not come back: forgotten in memory, and their headers overwritten on disk, wherever they may be."""

from __future__ import annotations

import numpy as np

from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Outcome, Outcomes
from kvortex.tiers.disk.crew import Crew
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.store import Store


def forget(store: Store, crew: Crew, keys: KeyArray, call: Call) -> Outcomes:
    """:meth:`kvortex.tiers.Tier.delete`. What is not ``OK`` or ``MISS`` is not found any more, and may be after a restart.

    The headers of all places that may hold one of the keys are overwritten: also where another record is just being
    written over one, which may then be lost. All slabs are flushed: a drive might otherwise forget, with its power, what was
    written over a record a second ago.
    """
    n = len(keys)
    outcomes = np.full(n, Outcome.FAILED, np.uint8)
    slots, once = np.full(n, -1), np.zeros(1, np.uint8)
    try:
        store.index.acquire(keys, taken=slots)
        there = slots >= 0
        store.index.drop(keys)
        places = store.places.holding(keys)
        generations = store.places.generations[places]
        erased = np.zeros(len(places), np.bool_)
        synced = np.zeros(len(store.slabs), np.bool_)

        def erase(at: int, pages: Pages) -> None:
            slab, offset = store.where(int(places[at]))
            try:
                slab.erase(offset, pages)
                erased[at] = True
            except OSError as error:
                store.failed(error)

        def sync(at: int, pages: Pages) -> None:
            try:
                store.slabs[at].sync()
                synced[at] = True
            except OSError as error:
                store.failed(error)

        begun, why = crew.run(erase, len(places), call)
        if begun == len(places):
            begun, why = crew.run(sync, len(store.slabs), call)
        store.places.erased(places[erased], generations[erased])
        whole = why == Outcome.OK and synced.all() and erased.all()
        if whole:
            outcomes[:] = np.where(there, Outcome.OK, Outcome.MISS)
        elif why != Outcome.OK:
            outcomes[:] = why
    finally:
        store.index.release(slots, once=once)
    return outcomes
