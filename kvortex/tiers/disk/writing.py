"""Records from memory to disk in two phases: a key can be found when its record was written as a whole, and not before."""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from kvortex.errors import PoolFullError
from kvortex.index import NEW, PENDING, RESIDENT
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Int64s, Outcome, Outcomes
from kvortex.tiers.disk.crew import Crew, RefusedError, Turn, over
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.places import marks_of
from kvortex.tiers.disk.store import Store, is_bad_spot

_WAVE = 256  # records that become visible together
_LOOK = 0.05  # seconds between looks at a key that somebody else is writing
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Flags = npt.NDArray[np.bool_]


def keep(
    store: Store, crew: Crew, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call
) -> Outcomes:
    """:meth:`kvortex.tiers.Tier.put_from`."""
    return Putting(store, crew, keys, addresses, sizes, digests, call).outcomes


class Putting:
    """One call of it."""

    def __init__(
        self, store: Store, crew: Crew, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call
    ) -> None:
        self.store, self.crew, self.call = store, crew, call
        self.keys, self.addresses, self.sizes, self.digests = keys, addresses, sizes, digests
        self.outcomes: Outcomes = np.full(len(keys), Outcome.TOO_LARGE, np.uint8)
        fits = np.flatnonzero(sizes <= store.form.most_bytes)
        first, same = _distinct(keys[fits])
        rows = fits[first]
        self.outcomes[rows] = Outcome.CANCELLED
        wave = min(_WAVE, store.places.count)
        for start in range(0, len(rows), wave):
            if (why := over(call)) is not None:  # before anything is evicted for what would not be written
                self.outcomes[rows[start:]] = why
                break
            self._write_all(rows[start : start + wave])
        self.outcomes[fits] = self.outcomes[rows[same]]  # what stands twice was stored once

    def _write_all(self, rows: Int64s) -> None:
        """Also what others are writing just now: when they have ended, it is there, or it is ours to write."""
        while len(rows := self._write(rows)):
            if (why := over(self.call)) is not None:
                self.outcomes[rows] = why
                return
            with self.store.settled:
                self.store.settled.wait(min(_LOOK, self.call.left()))

    def _write(self, rows: Int64s) -> Int64s:
        """Writes what is nowhere; the rows that must be tried again."""
        n = len(rows)
        slots = np.full(n, -1)
        good, bad = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        once = np.zeros((3, 1), np.uint8)
        try:
            try:
                made = self.store.index.reserve(self.keys[rows], taken=slots)
            except PoolFullError:
                return self._write_less(rows)
            again = self._found(rows, made.slots, made.status)
            self._write_new(rows, np.flatnonzero(made.status == NEW), slots, good, bad)
        finally:
            self._settle(rows, slots, good, bad, once)
        return rows[again]

    def _write_less(self, rows: Int64s) -> Int64s:
        """So many slots cannot be had at once."""
        if len(rows) == 1:
            self.outcomes[rows] = Outcome.FULL
            return rows[:0]
        half = len(rows) // 2
        return np.concatenate([self._write(rows[:half]), self._write(rows[half:])])

    def _found(self, rows: Int64s, slots: Int64s, status: npt.NDArray[np.uint8]) -> Flags:
        """What was there already; which rows are to be tried again: others write them, or they were of another length."""
        places = self.store.places
        there = status == RESIDENT
        other = there & (places.sizes[places.of_slot[slots]] != self.sizes[rows])
        self.outcomes[rows[there & ~other]] = Outcome.OK
        if other.any():
            self.store.index.drop(self.keys[rows[other]])
        again: Flags = (status == PENDING) | other
        return again

    def _write_new(self, rows: Int64s, new: Int64s, slots: Int64s, good: Flags, bad: Flags) -> None:
        store, mine = self.store, rows[new]
        generations = store.places.new_generations(len(new))
        headers = store.form.headers(self.keys[mine], self.sizes[mine], self.digests[mine], generations)
        marks = marks_of(self.keys[mine])
        at_place = store.places.of_slot[slots[new]].tolist()

        def step(at: int, pages: Pages) -> Turn:
            row, place = mine[at], at_place[at]
            address, size = int(self.addresses[row]), int(self.sizes[row])
            pages.put_header(headers[at].tobytes())
            slab, offset = store.where(place)
            call = slab.to_write(offset, address, size, pages)

            def after(turn: Turn) -> None:
                whole = False
                try:
                    slab.wrote(turn.done(), size)
                    store.unsynced = whole = True
                except OSError as error:
                    store.failed(error)
                    self.outcomes[row] = Outcome.FULL if error.errno in _FULL else Outcome.FAILED
                    bad[new[at]] = is_bad_spot(error)
                    return
                except RefusedError as refused:
                    self.outcomes[row] = refused.why
                    return
                finally:
                    store.places.end(place, whole=whole)
                good[new[at]] = True
                self.outcomes[row] = Outcome.OK

            turn = Turn(call, after)
            store.places.begin(place, self.keys[row], marks[at], size, int(generations[at]))
            return turn  # whose ``after`` is certain to end what has begun here

        begun, why = self.crew.run(step, len(new), self.call)
        self.outcomes[mine[begun:]] = why

    def _settle(self, rows: Int64s, slots: Int64s, good: Flags, bad: Flags, once: npt.NDArray[np.uint8]) -> None:
        index, mine = self.store.index, slots >= 0
        if not mine.any():
            return
        index.commit(slots[mine & (good | bad)], once=once[0])
        index.abort(slots[mine & ~good & ~bad], once=once[1])
        if bad.any():  # visible for a moment, when a read finds nothing: a slot that is pinned and dropped is nobody's
            keys = self.keys[rows[bad]]
            held = index.acquire(keys)
            index.drop(keys)
            self.store.quarantine(held[held >= 0])
        with self.store.settled:
            self.store.settled.notify_all()



def _distinct(keys: KeyArray) -> tuple[Int64s, Int64s]:
    """Where each different key stands first, in the order of keys, and for each key which of these it is."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 4)
    each = np.arange(len(words))
    if len(set(words[:, 0].tolist())) == len(words):  # as nearly always: a hundredth of the time of a search
        return each, each
    _, first, same = np.unique(words, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = each[: len(order)]
    return first[order], rank[same.reshape(-1)]
