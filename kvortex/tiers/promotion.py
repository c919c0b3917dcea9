"""Blocks on their way from tiers below into RAM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvortex import arguments
from kvortex.errors import ArgumentError, PoolFullError
from kvortex.index import DECLINED, PENDING
from kvortex.keys import KeyArray
from kvortex.tiers.base import Int64s, Outcome
from kvortex.tiers.line import Line
from kvortex.tiers.room import Room

if TYPE_CHECKING:
    from kvortex.tiers.cascade import Cascade

Flags = npt.NDArray[np.bool_]


class Promotion:
    """One request for blocks. Goes from tier to tier, the fastest first, until all blocks are in RAM or its time is up.

    Parameters
    ----------
    keys, sizes
        n keys, and the bytes of each record; a key may stand several times.
    deadline
        ``time.monotonic()`` at which whoever waits gets what is there by then. Calls of tiers that run then go on, and what
        they bring stays in RAM; what they do not bring gives its slots back when they come back.

    Attributes
    ----------
    over : bool
        Whether it has ended.
    mask : (n,) bool
        Once it is over, which blocks were in RAM at that moment.
    ended
        An event.
    """

    def __init__(self, keys: KeyArray, sizes: Int64s, deadline: float) -> None:
        self.keys, self.sizes, self.deadline = keys, sizes, deadline
        self.over, self.ended = False, threading.Event()
        self.mask: Flags = np.zeros(len(keys), bool)
        self.at = 0  # the next tier
        self.step = -1  # the tier that a thread is asking now
        self.pending: set[int] = set()  # numbers of fetches of others that bring blocks of this one

    def unique(self) -> tuple[KeyArray, Int64s]:
        """Each key once."""
        _, first = np.unique(self.keys, axis=0, return_index=True)
        first.sort()
        return self.keys[first], self.sizes[first]

    def finish(self, mask: Flags) -> None:
        """Called once, on the keeper's thread, while ``over`` is false still."""
        self.mask = mask


class Prefetch:
    """A running promotion, as its caller holds it. May be dropped: the blocks come all the same."""

    def __init__(
        self, promotion: Promotion, look: Callable[[KeyArray], Flags], whole: Callable[[Flags], Flags] | None = None
    ) -> None:
        self._promotion, self._look, self._whole = promotion, look, whole

    def done(self) -> bool:
        """Whether it has ended: everything is there, or no tier has the rest, or the deadline has passed. Never blocks."""
        return self._promotion.over

    def wait(self, timeout: float | None = None) -> Flags:
        """Waits for the end, at most ``timeout`` seconds and never beyond the promotion's own deadline.

        Returns
        -------
        (n,) bool
            Which blocks are in RAM: when the promotion ended, or else now. A later save may evict them again.

        Raises
        ------
        ArgumentError
            The timeout is no number of seconds.
        """
        allowed = float("inf") if timeout is None else arguments.seconds(timeout)
        left = max(0.0, self._promotion.deadline - time.monotonic())
        self._promotion.ended.wait(min(allowed, left))
        return self.mask

    @property
    def mask(self) -> Flags:
        """(n,) bool; see :meth:`wait`."""
        mask = self._promotion.mask.copy() if self._promotion.over else self._look(self._promotion.keys)
        return mask if self._whole is None else self._whole(mask)


class Fetcher:
    """What a reading thread does of a promotion with one tier."""

    def __init__(self, room: Room, cascade: Cascade, readers: int) -> None:
        self._room, self._cascade, self._readers = room, cascade, readers

    def step(self, promotion: Promotion, at: int) -> None:
        """Brings what is missing and the tier has."""
        pending: set[int] = set()
        try:
            line = self._cascade.lines[at]
            keys, sizes = promotion.unique()
            missing = ~self._room.index.lookup(keys)
            keys, sizes = keys[missing], sizes[missing]
            there = line.has(keys) if len(keys) and not promotion.over else np.zeros(len(keys), bool)
            keys, sizes = keys[there], sizes[there]
            while len(keys) and line.breaker.closed and not promotion.over:
                time.sleep(self._room.quiet())
                count = self._fitting(line, sizes)
                pending |= self._fetch(promotion, at, keys[:count], sizes[:count])
                keys, sizes = keys[count:], sizes[count:]
        finally:
            self._cascade.stepped(promotion, at, pending)

    def _fitting(self, line: Line, sizes: Int64s) -> int:
        most = min(line.options.batch_blocks, self._room.most_held(self._readers))
        return max(1, min(most, int((np.cumsum(sizes) <= line.options.batch_bytes).sum())))

    def _fetch(self, promotion: Promotion, at: int, keys: KeyArray, sizes: Int64s) -> set[int]:
        """One batch. Numbers of the fetches of others that are bringing some of its blocks just now."""
        number, taken = self._room.number(), np.full(len(keys), -1, np.int64)
        good = np.zeros(len(keys), bool)
        self._cascade.fetches[number] = None  # before anybody can find it in the index
        self._room.held[number] = None
        try:
            pending = self._reserve(keys, sizes, number, taken)
            mine = np.flatnonzero(taken >= 0)
            if len(mine):
                good[mine] = self._bring(promotion, at, keys[mine], sizes[mine], taken[mine])
            return pending
        except (PoolFullError, ArgumentError):  # no room, or a record of another length by that key: misses
            self._cascade.lines[at].guard.tally.drop("pool_full", len(keys))
            return set()
        finally:
            index = self._room.index
            index.commit(taken[good])  # first those: who is told that this fetch has ended must find them
            index.abort(taken[(taken >= 0) & ~good])
            self._room.held.pop(number, None)
            self._cascade.fetched(number, at, keys[good], sizes[good])

    def _reserve(self, keys: KeyArray, sizes: Int64s, number: int, taken: Int64s) -> set[int]:
        """Slots for what is nowhere. A tier admitted it once, so admission to RAM is asked as often as it wants to be."""
        index, rows = self._room.index, np.arange(len(keys))
        pending: set[int] = set()
        for _ in range(index.admit_after):
            mine = np.full(len(rows), -1, np.int64)
            try:
                found = index.reserve(keys[rows], sizes[rows], owner=number, taken=mine)
            finally:
                taken[rows] = mine
            waits = found.owners[found.status == PENDING].tolist()
            pending.update(owner for owner in waits if owner in self._cascade.fetches)
            rows = rows[found.status == DECLINED]
            if not len(rows):
                break
        return pending

    def _bring(self, promotion: Promotion, at: int, keys: KeyArray, sizes: Int64s, slots: Int64s) -> Flags:
        line, room = self._cascade.lines[at], self._room
        stopped = self._cascade.is_closing
        terms = line.terms(line.options.read_timeout_s, lambda: promotion.over or stopped())
        fetched = line.way.get_into(keys, room.at(slots), sizes, terms)
        good = (fetched.outcomes == Outcome.OK) & (fetched.sizes == sizes)
        room.keep_digests(slots[good], fetched.digests[good])
        line.stored(keys[good])
        line.lost(keys[np.isin(fetched.outcomes, (Outcome.MISS, Outcome.CORRUPT))])
        line.guard.tally.promote(int(good.sum()))
        return np.asarray(good)


