"""What joins RAM and the tiers below it.

Down: blocks that were saved are offered to every tier, and wait in its queue until a thread of its own writes them
(``writing.py``). An offer is one step for whoever makes it, and never blocks: what finds no room is not stored there, and
counted. Up: blocks that are wanted go from tier to tier, the fastest first, until they are in RAM (``promotion.py``), and are
then offered to the tiers above the one that had them.

One thread decides (``keeper.py``), and threads of each tier wait for it (``line.py``): a tier that hangs keeps its own threads,
and the few slots that they hold, and nobody else.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvortex.digests.host import load_compiled
from kvortex.errors import told
from kvortex.keys import KeyArray
from kvortex.tiers.base import Int64s
from kvortex.tiers.keeper import Keeper
from kvortex.tiers.line import Line, line_names
from kvortex.tiers.metrics import TierStats
from kvortex.tiers.promotion import Fetcher, Promotion
from kvortex.tiers.room import Room
from kvortex.tiers.urls import OpenTier
from kvortex.tiers.writing import Writing

Flags = npt.NDArray[np.bool_]
_MOST_OFFERS = 4096  # that the keeper has not looked at
_TICK_S = 0.05
_GIVING_UP_S = 1.0  # of threads that have nothing to do yet, where others could not be started
_PATIENCE_S, _NAP_S = 0.2, 2e-4  # of a save for which tiers have too many slots


class Cascade:
    """The tiers below one pool. All methods but :meth:`flush`, :meth:`check` with a timeout, and :meth:`close` return at once.

    Starts its threads when it is made. Thread-safe, and may be entered by a finaliser or a signal's handler anywhere.

    Parameters
    ----------
    tiers
        At least one, from the fastest to the slowest. They are closed by :meth:`close`.
    room
        The pool. Its memory must stay until :meth:`close` has returned 0.

    Attributes
    ----------
    lines
        One a tier.
    closed : bool
        Whether :meth:`close` has come to its end.
    fetches
        Numbers of batches on their way into RAM.
    notes
        What went wrong in here, at most a few.
    """

    def __init__(self, tiers: Sequence[OpenTier], room: Room) -> None:
        self._room, self._closing, self.closed = room, False, False
        opened = list(tiers)
        load_compiled()  # lest the first record is compiled for, for seconds, while its deadline runs
        self._keeper = Keeper(self._tick, self._failed, "kvortex-tiers")
        names = zip(opened, line_names(opened), strict=True)
        self.lines = [Line(each, name, self.is_closing, self._wake) for each, name in names]
        self.fetches: dict[int, None] = {}
        self.notes: list[str] = []
        self._promotions: dict[int, Promotion] = {}
        self._flushes: list[threading.Event] = []
        writers = sum(line.options.write_threads for line in self.lines)
        readers = sum(line.options.read_threads for line in self.lines)
        self._writing = [Writing(line, room, writers, self._keeper.put) for line in self.lines]
        self._fetcher = Fetcher(room, self, readers)
        self._started: list[threading.Thread] = []
        self._closers: list[threading.Thread] = []
        try:
            for thread in (self._keeper.thread, *(thread for line in self.lines for thread in line.threads)):
                thread.start()
                self._started.append(thread)
        except BaseException:
            self.close(time.monotonic() + _GIVING_UP_S)
            raise

    def is_closing(self) -> bool:
        """Whether everything is to come to its end."""
        return self._closing

    # -- down

    def is_awake(self) -> bool:
        """Whether any tier is called at all. Calls ask this first: while all breakers are open tiers cost no more than that."""
        return any(line.breaker.closed for line in self.lines)

    def offer(self, keys: KeyArray, sizes: Int64s, which: Flags) -> None:
        """Blocks that are in RAM now, ``which`` of these keys: each tier gets them, as its options say."""
        blocks = int(np.count_nonzero(which))
        if not blocks or self._closing:
            return
        reason = "queue_full" if self.is_awake() else "breaker"
        if reason == "breaker" or self._keeper.backlog() >= _MOST_OFFERS:
            for line in self.lines:
                line.guard.tally.drop(reason, blocks)
            return
        self._keeper.put(functools.partial(self._offered, keys[which], sizes[which], len(self.lines)))

    def _offered(self, keys: KeyArray, sizes: Int64s, count: int) -> None:
        for writing in self._writing[:count]:
            writing.offer(keys, sizes)

    def forget(self, keys: KeyArray) -> None:
        """Deletes blocks from all tiers, in the background: for records that turned out to be damaged."""
        for line in self.lines:
            line.lost(keys)
            if line.breaker.closed and not self._closing:
                line.hand(line.writers, functools.partial(self._delete, line, keys))
                self._wake()

    def _delete(self, line: Line, keys: KeyArray) -> None:
        line.way.delete(keys, line.call(line.options.write_timeout_s))
        line.lost(keys)

    def flush(self, deadline: float) -> bool:
        """Waits until what was offered so far is written, or dropped; whether that was so by the deadline."""
        written = threading.Event()
        if self._closing:
            return True
        self._keeper.put(functools.partial(self._flush, written))
        return written.wait(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))

    def _flush(self, written: threading.Event) -> None:
        self._flushes.append(written)
        for writing in self._writing:
            writing.flushing = True

    def give_way(self, began: float) -> bool:
        """For who finds no free slot, since ``began``: waits a moment for those that tiers have just now, and keeps them from
        taking others; whether to try again. Not for long, and not for calls that hang."""
        held, now = len(self._room.held), time.monotonic()
        if not held or now - began > _PATIENCE_S or held <= sum(line.guard.overdue() for line in self.lines):
            return False
        self._room.quiet_until = now + _PATIENCE_S / 4
        time.sleep(_NAP_S)
        return True

    # -- up

    def submit(self, promotion: Promotion) -> None:
        """Starts a promotion. It ends at its deadline at the latest."""
        self._keeper.put(functools.partial(self._begin, promotion))

    def _begin(self, promotion: Promotion) -> None:
        self._promotions[id(promotion)] = promotion
        self._keeper.at(promotion.deadline, functools.partial(self._finish, promotion))
        self._advance(promotion)

    def _advance(self, promotion: Promotion) -> None:
        """To the next tier; to the end, where none is left or nothing is missing."""
        if promotion.over or promotion.pending:
            return
        while promotion.at < len(self.lines) and not self._closing and not self._room.index.lookup(promotion.keys).all():
            at, promotion.at = promotion.at, promotion.at + 1
            if self.lines[at].breaker.closed:
                promotion.step = at
                self.lines[at].hand(self.lines[at].readers, functools.partial(self._fetcher.step, promotion, at))
                return
        self._finish(promotion)

    def stepped(self, promotion: Promotion, at: int, pending: set[int]) -> None:
        """A reading thread has done what one tier can do for a promotion."""
        self._keeper.put(functools.partial(self._stepped, promotion, at, pending))

    def _stepped(self, promotion: Promotion, at: int, pending: set[int]) -> None:
        if promotion.step != at:  # nobody waited for that
            return
        promotion.step = -1
        promotion.pending = {number for number in pending if number in self.fetches}
        self._advance(promotion)

    def fetched(self, number: int, at: int, keys: KeyArray, sizes: Int64s) -> None:
        """A batch has ended; these blocks came with it."""
        self._keeper.put(functools.partial(self._fetched, number, at, keys, sizes))

    def _fetched(self, number: int, at: int, keys: KeyArray, sizes: Int64s) -> None:
        self.fetches.pop(number, None)
        if len(keys):
            self._offered(keys, sizes, at)
        for promotion in list(self._promotions.values()):
            if number in promotion.pending:
                promotion.pending.discard(number)
                self._advance(promotion)

    def _pass_by(self, at: int) -> None:
        """Promotions that wait for a tier whose breaker has opened go on without it."""
        for promotion in list(self._promotions.values()):
            if promotion.step == at:
                promotion.step = -1
                self._advance(promotion)

    def _finish(self, promotion: Promotion) -> None:
        if promotion.over:
            return
        try:
            promotion.finish(self._room.index.lookup(promotion.keys))
        finally:
            promotion.over = True
            promotion.ended.set()
            self._promotions.pop(id(promotion), None)

    def deadline(self, longest: float) -> float:
        """When a promotion that begins now should end: each tier has twice the time of a call, all together ``longest``."""
        allowed = sum(2 * line.options.read_timeout_s for line in self.lines if line.breaker.closed)
        return time.monotonic() + min(longest, allowed)

    # -- what is where

    def may_have(self, keys: KeyArray) -> Flags:
        """Which keys are worth a promotion: a tier has them, or nothing is known about them. No round trip."""
        found = np.zeros(len(keys), bool)
        for line in self.lines:
            if line.breaker.closed and not found.all():
                rest = ~found
                found[rest] = line.may_have(keys[rest])
        return found

    def check(self, keys: KeyArray, timeout: float = 0.0) -> Flags:
        """Which keys are in a tier, as far as is known; asks in the background about the others.

        Parameters
        ----------
        keys
        timeout
            Seconds to wait for these answers.
        """
        found, waits = np.zeros(len(keys), bool), []
        for line in self.lines:
            rest = np.flatnonzero(~found)
            if not line.breaker.closed or not len(rest):
                continue
            found[rest], unknown = line.look(keys[rest])
            if unknown.any():
                answered = threading.Event()
                if line.ask(keys[rest[unknown]], answered.set if timeout else None) and timeout:
                    waits.append((line, answered))
        deadline = time.monotonic() + timeout
        for line, answered in waits:
            if answered.wait(max(0.0, deadline - time.monotonic())):
                found |= line.known.lookup(keys)
        return found

    def stats(self) -> tuple[TierStats, ...]:
        """A snapshot of each tier."""
        pairs = zip(self.lines, self._writing, strict=True)
        return tuple(line.stats(writing.blocks, writing.nbytes) for line, writing in pairs)

    # -- the keeper's

    def _wake(self) -> None:
        """Makes it look after what was handed to threads behind its back."""
        self._keeper.put(_nothing)

    def _tick(self) -> float | None:
        """Looks after what comes with time; says when to look again."""
        wants: list[float] = []
        for at, (line, writing) in enumerate(zip(self.lines, self._writing, strict=True)):
            line.guard.overdue()
            writing.pump()
            if not line.breaker.closed and not self._closing:
                self._pass_by(at)
                line.start_probe()
                wants.append(max(_TICK_S, line.breaker.rest()))
            due = writing.next_due()
            if due is not None:
                wants.append(max(due, _TICK_S))
            if line.busy() or line.guard.running():
                wants.append(_TICK_S)
        if self._flushes and all(writing.idle for writing in self._writing):
            for writing in self._writing:
                writing.flushing = False
            while self._flushes:
                self._flushes.pop().set()
        return min(wants) if wants else None

    def _failed(self, error: BaseException) -> None:
        if len(self.notes) < 10:
            self.notes.append(f"the cascade of tiers: {told(error)}")

    # -- the end

    def stop_fetching(self) -> None:
        """Ends all promotions with what is there now; for whoever waits for them to end."""
        self._keeper.put(self._end_promotions)

    def _end_promotions(self) -> None:
        for promotion in list(self._promotions.values()):
            self._finish(promotion)

    def owns_thread(self, thread: threading.Thread) -> bool:
        """Whether it is one of this cascade's, which cannot wait for its own end."""
        return thread in self._started

    def close(self, deadline: float) -> int:
        """Drops what waits, ends all threads and closes the tiers.

        Parameters
        ----------
        deadline
            ``time.monotonic()``.

        Returns
        -------
        int
            Threads that are still in a call of a tier. While there are any, the pool's memory must stay: they may be
            writing there. Call again.
        """
        if self.closed:
            return 0
        if not self._closing:
            self._closing = True
            self._keeper.put(self._shut)
        keeper, *workers = self._started or [self._keeper.thread]
        left = sum(not _ended(thread, deadline) for thread in workers)
        if left:
            return left
        self._keeper.stop()
        if not _ended(keeper, deadline):
            return 1
        if not self._closers:
            closes = [line.close for line in self.lines]
            self._closers = [threading.Thread(target=close, name="kvortex-tier-close", daemon=True) for close in closes]
            for thread in self._closers:
                thread.start()
        left = sum(not _ended(thread, deadline) for thread in self._closers)
        self.closed = not left
        return left

    def _shut(self) -> None:
        self._end_promotions()
        for writing in self._writing:
            writing.abandon("closed")
        for line in self.lines:
            for work, count in ((line.readers, line.options.read_threads), (line.writers, line.options.write_threads)):
                for _ in range(count):
                    work.put(None)


def _nothing() -> None:
    """Work that is done when the keeper has woken."""


def _ended(thread: threading.Thread, deadline: float) -> bool:
    """Whether a thread has ended, by the deadline."""
    if thread.ident is None:
        return True
    thread.join(max(0.0, deadline - time.monotonic()))
    return not thread.is_alive()

