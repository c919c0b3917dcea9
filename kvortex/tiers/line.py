"""One tier as the cascade has it: guarded, with threads of its own, and what is known of its keys."""

from __future__ import annotations

import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvortex.errors import told
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call
from kvortex.tiers.breaker import Breaker
from kvortex.tiers.codings import TierCoding
from kvortex.tiers.guarded import Guarded
from kvortex.tiers.keyset import KeySet
from kvortex.tiers.metrics import Tally, TierStats
from kvortex.tiers.transcoding import Transcoded
from kvortex.tiers.urls import OpenTier
from kvortex.tiers.ways import Direct, Terms, Trimmed, Way

_SMALL_SET = 1 << 13
_MOST_QUESTIONS = 64
Flags = npt.NDArray[np.bool_]
Work = Callable[[], None]


class Line:
    """A tier of one cascade.

    Attributes
    ----------
    name
        For metrics.
    way
        What threads of the tier call to store and to fetch blocks: between slots and the tier's records.
    lossy : bool
        Whether blocks come back from here with loss.
    known
        Keys that were seen there lately; not asked where the tier is ``local``.
    absent
        Keys that were looked for there lately, in vain.
    asked
        Keys that somebody is asking for in the background.
    readers, writers
        What the threads of each kind do next; None ends one.
    """

    def __init__(self, opened: OpenTier, name: str, closing: Callable[[], bool], wake: Work) -> None:
        self.tier, self.options, coding = opened
        self.name, self._closing, self._wake = name, closing, wake
        self._numbers = itertools.count()
        self._handed: dict[int, None] = {}
        self.breaker = Breaker(self.options.breaker)
        self.guard = Guarded(self.tier, self.breaker)
        self.way = way_of(coding, self.guard, name, self.options.codec_threads)
        self.lossy = coding is not None and coding.lossy
        self.local = self.tier.local if self.options.local is None else self.options.local
        few = min(self.options.known_keys, _SMALL_SET)
        self.known = KeySet(self.options.known_keys, self.options.fresh_s)
        self.absent, self.asked = KeySet(few, self.options.absent_s), KeySet(few, self.options.absent_s)
        self.readers: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.writers: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        kinds = (("read", self.readers, self.options.read_threads), ("write", self.writers, self.options.write_threads))
        self.threads = [
            threading.Thread(target=_serve, args=(work, self.guard.tally), name=f"kvortex-{name}-{kind}-{at}", daemon=True)
            for kind, work, count in kinds
            for at in range(count)
        ]

    def hand(self, work: queue.SimpleQueue[Work | None], job: Work) -> None:
        """Leaves a job to a thread of the tier."""
        number = next(self._numbers)
        self._handed[number] = None  # from now on, lest a call that hangs is overlooked before it has begun
        work.put(functools.partial(self._do, number, job))

    def _do(self, number: int, job: Work) -> None:
        try:
            job()
        finally:
            self._handed.pop(number, None)

    def busy(self) -> bool:
        """Whether a thread has something to do."""
        return bool(self._handed)

    def call(self, seconds: float, cancelled: Callable[[], bool] | None = None) -> Call:
        """The terms of a call that begins now."""
        return Call(time.monotonic() + seconds, self._closing if cancelled is None else cancelled)

    def terms(self, seconds: float, cancelled: Callable[[], bool] | None = None) -> Terms:
        """The terms of a batch, as those of a call."""
        return Terms(seconds, self._closing if cancelled is None else cancelled)

    def look(self, keys: KeyArray) -> tuple[Flags, Flags]:
        """Which keys are there as far as is known without a round trip, and of which nothing is known."""
        found = self.seen(keys)
        if not self.local:
            return found, ~found & ~self.absent.lookup(keys)
        there = self.guard.contains(keys, self.call(self.options.read_timeout_s))
        return found if there is None else there, np.zeros(len(keys), bool)

    def seen(self, keys: KeyArray) -> Flags:
        """Which keys were seen there lately. None where to ask costs nothing: what the tier itself says is true longer."""
        return np.zeros(len(keys), bool) if self.local else self.known.lookup(keys)

    def may_have(self, keys: KeyArray) -> Flags:
        """Which keys are worth a try."""
        found, unknown = self.look(keys)
        return found | unknown

    def ask(self, keys: KeyArray, told: Work | None = None) -> bool:
        """Finds out in the background which keys are there; whether a thread was asked to."""
        if self.readers.qsize() >= _MOST_QUESTIONS:
            return False
        if told is None:
            keys = keys[~self.asked.lookup(keys)]
            if not len(keys):
                return False
            self.asked.add(keys)
        self.hand(self.readers, functools.partial(self._answer, keys, told))
        self._wake()
        return True

    def _answer(self, keys: KeyArray, told: Work | None) -> None:
        try:
            if self.breaker.closed and not self._closing():
                self.has(keys)
        finally:
            if told is not None:
                told()

    def has(self, keys: KeyArray) -> Flags:
        """Which keys are there: asks, and remembers."""
        found = self.seen(keys)
        if not found.all():
            rest = ~found
            there = self.guard.contains(keys[rest], self.call(self.options.read_timeout_s))
            if there is not None:
                found[rest] = there
                self.known.add(keys[rest][there])
                self.absent.add(keys[rest][~there])
                self.absent.drop(keys[rest][there])
        return found

    def stored(self, keys: KeyArray) -> None:
        """They are there."""
        self.known.add(keys)
        self.absent.drop(keys)

    def lost(self, keys: KeyArray) -> None:
        """They are not there."""
        self.known.drop(keys)
        self.absent.add(keys)

    def start_probe(self) -> None:
        """Probes in the background, where that is due and every call has come back."""
        if not self.guard.overdue() and self.breaker.wants_probe():
            call = Call(time.monotonic() + self.options.read_timeout_s, self._closing)
            try:
                threading.Thread(target=self.guard.probe, args=(call,), name=f"kvortex-{self.name}-probe", daemon=True).start()
            except RuntimeError as error:  # no thread is to be had; nobody else would ever end this probe
                self.breaker.probed(told(error))

    def close(self) -> None:
        """Closes the tier, and ends what codes for it."""
        self.way.close()
        self.tier.close()

    def stats(self, queue_blocks: int, queue_bytes: int) -> TierStats:
        """A snapshot."""
        tally, breaker = self.guard.tally, self.breaker
        return TierStats(
            tier=self.name,
            breaker=breaker.state.name.lower(),
            breaker_trips=breaker.trips,
            breaker_reason=breaker.reason,
            operations=tally.operations(),
            errors=tally.errors(),
            corrupt=tally.corrupt(),
            used_bytes=self.tier.used_bytes(),
            capacity_bytes=self.tier.capacity_bytes,
            evictions=self.tier.evictions(),
            queue_blocks=queue_blocks,
            queue_bytes=queue_bytes,
            dropped=tally.dropped(),
            promoted_blocks=tally.promoted,
            codec=None if self.way.tally is None else self.way.tally.stats(),
        )


def _serve(work: queue.SimpleQueue[Work | None], tally: Tally) -> None:
    """A thread. What a tier raises never gets here; should anything else, the thread goes on with others' work."""
    while (job := work.get()) is not None:
        try:
            job()
        except Exception as error:
            tally.error(f"internal {type(error).__name__}")
        del job  # holds keys, and what waits for them


def line_names(tiers: list[OpenTier]) -> list[str]:
    """Different names, by kind."""
    counts: dict[str, int] = {}
    names = []
    for opened in tiers:
        kind = opened.tier.name
        counts[kind] = counts.get(kind, 0) + 1
        names.append(kind if counts[kind] == 1 else f"{kind}-{counts[kind]}")
    return names


def way_of(coding: TierCoding | None, guard: Guarded, name: str, threads: int) -> Way:
    """Between slots and records of a tier."""
    if coding is None:
        return Direct(guard)
    return Trimmed(guard, coding.tally) if coding.own is None else Transcoded(guard, coding, name, threads)
