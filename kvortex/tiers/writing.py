"""What waits to be written to one tier, and the batches that are on their way."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvortex.keys import KeyArray
from kvortex.tiers.base import Int64s, Outcome, Outcomes
from kvortex.tiers.keyset import KeySet
from kvortex.tiers.line import Line
from kvortex.tiers.offers import Offers
from kvortex.tiers.room import Room

_QUEUED_S = 600.0  # a key that was left behind in the set of queued ones is offered again after that, at the latest


@dataclass
class Batch:
    """Blocks of one call, whose slots are pinned from its making to ``once``."""

    keys: KeyArray
    slots: Int64s
    sizes: Int64s
    waited: int  # bytes by which the queue is shorter when this has been written
    number: int
    once: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, np.uint8))


class Writing:
    """The queue of one tier. Everything but :meth:`_write` happens on the keeper's thread.

    Blocks wait unpinned, as keys: a queue of any length keeps no slot from being evicted, and what was evicted before its
    turn is skipped and counted. A batch is pinned when a thread is free to write it, so that tiers never hold more of
    the pool than :meth:`Room.most_held` says for each thread, however slow they are.

    Attributes
    ----------
    blocks, nbytes
        That wait or are being written.
    """

    def __init__(self, line: Line, room: Room, threads: int, post: Callable[[Callable[[], None]], None]) -> None:
        self._line, self._room, self._threads, self._post = line, room, threads, post
        self._waiting: collections.deque[tuple[KeyArray, Int64s, float]] = collections.deque()  # keys, sizes, when due
        self._queued = KeySet(min(line.options.queue_blocks, 1 << 16), _QUEUED_S)
        self._offers = Offers(line.options, line.guard.tally)
        self._idle = line.options.write_threads
        self.blocks = self.nbytes = 0
        self.flushing = False

    @property
    def idle(self) -> bool:
        """Whether nothing waits, and nothing is being written."""
        return not self.blocks

    def offer(self, keys: KeyArray, sizes: Int64s) -> None:
        """Blocks that were saved; those that wait already, or were seen there lately, are passed over."""
        options, tally = self._line.options, self._line.guard.tally
        if options.mode == "read":
            return
        if not self._line.breaker.closed:
            tally.drop("breaker", len(keys))
            return
        wanted = ~self._line.seen(keys) & ~self._queued.lookup(keys)
        fits = (sizes >= (options.least_bytes or 0)) & (sizes <= (options.most_bytes or sizes))
        tally.drop("size", int((wanted & ~fits).sum()))
        rows = np.flatnonzero(wanted & fits)
        rows = rows[self._offers.admitted(keys[rows])]
        room = (np.arange(1, len(rows) + 1) <= options.queue_blocks - self.blocks) & (
            np.cumsum(sizes[rows]) <= options.queue_bytes - self.nbytes
        )
        tally.drop("queue_full", int((~room).sum()))
        rows = rows[room]
        if len(rows):
            due = time.monotonic() + (options.write_delay_s if options.mode == "back" else 0.0)
            self._waiting.append((keys[rows], sizes[rows], due))
            self._queued.add(keys[rows])
            self.blocks += len(rows)
            self.nbytes += int(sizes[rows].sum())
        self.pump()

    def pump(self) -> None:
        """Hands batches to threads that have nothing to do."""
        if not self._line.breaker.closed:
            self.abandon("breaker")
            return
        while self._idle and self._waiting and self._is_due() and not self._room.quiet():
            batch = self._next()
            if batch is not None:
                self._idle -= 1
                self._line.hand(self._line.writers, functools.partial(self._write, batch))

    def _is_due(self) -> bool:
        return self.flushing or self._waiting[0][2] <= time.monotonic() or 2 * self.blocks > self._room.index.ready

    def next_due(self) -> float | None:
        """Seconds until something is due; None where nothing waits that a thread could write."""
        if not self._waiting or not self._idle:
            return None
        return max(0.0 if self._is_due() else self._waiting[0][2] - time.monotonic(), self._room.quiet())

    def _next(self) -> Batch | None:
        """The first blocks that wait, pinned; None where all of these are gone from RAM."""
        keys, sizes = self._taken(min(self._line.options.batch_blocks, self._room.most_held(self._threads)))
        slots, index = np.full(len(keys), -1, np.int64), self._room.index
        number = self._room.number()
        self._room.held[number] = None
        index.acquire(keys, taken=slots, counts=False)
        try:
            there = slots >= 0
            if not there.all():
                self._gone(keys[~there], int(sizes[~there].sum()))
                self._line.guard.tally.drop("evicted", int((~there).sum()))
            if there.any():
                return Batch(keys[there], slots[there], index.size_of(slots[there]), int(sizes[there].sum()), number)
            self._room.held.pop(number)
            return None
        except BaseException:
            index.release(slots)
            self._room.held.pop(number, None)
            raise

    def _taken(self, most: int) -> tuple[KeyArray, Int64s]:
        """Takes blocks from the front of the queue, at least one."""
        parts: list[tuple[KeyArray, Int64s]] = []
        left, nbytes = most, self._line.options.batch_bytes
        while left and self._waiting and (not parts or self._is_due()):
            keys, sizes, due = self._waiting.popleft()
            count = min(left, max(int((np.cumsum(sizes) <= nbytes).sum()), 0 if parts else 1))
            if count < len(keys):
                self._waiting.appendleft((keys[count:], sizes[count:], due))
            if not count:
                break
            parts.append((keys[:count], sizes[:count]))
            left -= count
            nbytes -= int(sizes[:count].sum())
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _write(self, batch: Batch) -> None:
        """By a thread of the tier."""
        outcomes = np.full(len(batch.keys), Outcome.FAILED, np.uint8)
        try:
            if self._line.breaker.closed:
                terms = self._line.terms(self._line.options.write_timeout_s)
                digests = self._room.digests_of(batch.slots, batch.sizes)
                addresses = self._room.at(batch.slots)
                outcomes = self._line.way.put_from(batch.keys, addresses, batch.sizes, digests, terms)
        finally:
            self._room.index.release(batch.slots, once=batch.once)
            self._room.held.pop(batch.number, None)
            self._post(functools.partial(self._written, batch, outcomes))

    def _written(self, batch: Batch, outcomes: Outcomes) -> None:
        self._idle += 1
        self._line.stored(batch.keys[outcomes == Outcome.OK])
        for outcome in Outcome:
            if outcome is not Outcome.OK:
                self._line.guard.tally.drop(outcome.name.lower(), int((outcomes == outcome).sum()))
        self._gone(batch.keys, batch.waited)

    def _gone(self, keys: KeyArray, nbytes: int) -> None:
        """They do not wait any more."""
        self._queued.drop(keys)
        self.blocks -= len(keys)
        self.nbytes -= nbytes

    def abandon(self, reason: str) -> None:
        """What waits will not be written."""
        while self._waiting:
            keys, sizes, _ = self._waiting.popleft()
            self._line.guard.tally.drop(reason, len(keys))
            self._gone(keys, int(sizes.sum()))
