"""One of kvortex's tiers below a pool that is vLLM's, without vLLM's classes.

vLLM's scheduler calls from one thread and never waits: what takes time is done by threads of the tier, behind its breaker and
with deadlines. Whatever goes wrong there is a job that failed, and a block that is computed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvortex.digests import DIGEST_BYTES, digest_records
from kvortex.digests.host import load_compiled
from kvortex.errors import ConfigError, TransferTimeoutError
from kvortex.integrations.vllm.ledger import keys_of
from kvortex.integrations.vllm.questions import Questions
from kvortex.keys import Namespace
from kvortex.tiers.base import Int64s, Outcome
from kvortex.tiers.line import Line
from kvortex.tiers.metrics import TierStats
from kvortex.tiers.offers import Offers
from kvortex.tiers.urls import OpenTier

_ALIGNMENT = 4096  # of addresses that tiers take
_FLUSH_S = 3.0  # that jobs have which no thread has begun, where all are to end
_DRAIN_S = 60.0
_NAP_S = 1e-3
_Entry = TypeVar("_Entry")
_Work = queue.SimpleQueue[Callable[[], None] | None]


@dataclass(frozen=True)
class Chunks:
    """vLLM's pool: ``count`` chunks of ``nbytes`` each, one behind the other from ``address`` on."""

    address: int
    count: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.address % _ALIGNMENT or self.nbytes % _ALIGNMENT or not self.nbytes:
            raise ConfigError(
                f"vLLM's pool has chunks of {self.nbytes} bytes from {self.address:#x} on; tiers need multiples of {_ALIGNMENT}"
            )

    def at(self, numbers: Int64s) -> Int64s:
        """(n,) int64 addresses."""
        return self.address + numbers * self.nbytes

    def has(self, numbers: Int64s) -> bool:
        """Whether all of them are chunks."""
        return bool(((numbers >= 0) & (numbers < self.count)).all())


@dataclass
class Job:
    """What vLLM asked for: to store chunks here, or to load them; ``names`` are their keys in its words.

    Behind its end ``good`` (n,) bool says which chunks are where they should be; what was to be loaded and is not may hold
    anything. ``nbytes`` were moved.
    """

    number: int
    loads: bool
    names: list[bytes]
    chunks: Int64s
    deadline: float = np.inf  # to begin
    counted: int = 0  # chunks that wait to be stored, or are being stored
    nbytes: int = 0
    seconds: float = 0.0
    good: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.good = np.zeros(len(self.names), bool)


class TierSide:
    """What is asked of one tier. All methods but :meth:`drain` and :meth:`close` return at once.

    vLLM keeps the chunks of a job from being evicted until the job has ended. So no more than a share of its pool may wait to
    be stored; what is beyond that is not stored here, and counted.

    Parameters
    ----------
    opened
        Closed by :meth:`close`.
    namespace
        What the blocks are of.
    chunks
        Must stay until :meth:`close` has returned.
    share
        Of the chunks, that may wait to be stored or are being stored.

    Raises
    ------
    ConfigError
        The tier is to write later (``mode=back``): nothing of that kind can be asked of vLLM's pool.
    """

    def __init__(self, opened: OpenTier, namespace: Namespace, chunks: Chunks, share: float) -> None:
        options = opened.options
        if options.mode == "back":
            raise ConfigError("mode = 'back': vLLM keeps chunks pinned until they are stored; 'through' stores them at once")
        load_compiled()
        self._namespace, self._chunks, self._closing = namespace, chunks, False
        self._line = Line(opened, opened.tier.name, lambda: self._closing, lambda: None)
        self._patience_s = 2 * options.read_timeout_s
        self._questions = Questions(self._patience_s)
        self._most = min(options.queue_blocks, options.queue_bytes // chunks.nbytes, max(1, int(chunks.count * share)))
        self._offers = Offers(options, self._line.guard.tally)
        self._jobs: dict[int, Job] = {}  # that have not been told to have ended
        self._waiting: dict[int, Job] = {}  # that no thread has begun; whoever pops one has it
        self._ended: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[bytes, bool]] = queue.SimpleQueue()
        self._storing = 0  # chunks
        self._draining = False
        try:
            for thread in self._line.threads:
                thread.start()
        except BaseException:
            self._end_threads()
            raise

    # -- what vLLM's scheduler asks

    def lookup(self, name: bytes, request: str) -> str:
        """``"hit"``, ``"miss"``, or ``"retry"`` in a later step."""
        self._learn()
        there = self._questions.ask(name, request) if self._line.breaker.closed else False
        return "retry" if there is None else "hit" if there else "miss"

    def store(self, job: Job) -> None:
        """Starts to store chunks, but for those that are not admitted. A job for which there is no room ends at once."""
        self._jobs[job.number] = job
        if not self._known(job):
            return
        reason = self._refusal(len(job.names))
        if reason is None:
            job.counted = len(job.names)
            self._storing += job.counted
            self._hand(job, self._line.writers, self._put)
            return
        if reason:
            self._line.guard.tally.drop(reason, len(job.names))
        self._ended.put(job)

    def _refusal(self, count: int) -> str | None:
        """Why so many chunks are not stored; None where they are, empty where nothing ever is."""
        options, size = self._line.options, self._chunks.nbytes
        if options.mode == "read":
            return ""
        if not (options.least_bytes or 0) <= size <= (options.most_bytes or size):
            return "size"
        if not self._line.breaker.closed:
            return "breaker"
        return "queue_full" if self._storing and self._storing + count > self._most else None

    def load(self, job: Job) -> None:
        """Starts to load chunks. A job that no thread has begun in time has failed."""
        job.deadline = time.monotonic() + self._patience_s
        self._jobs[job.number] = job
        if self._known(job):
            self._hand(job, self._line.readers, self._get)

    def _known(self, job: Job) -> bool:
        """Whether its chunks are the pool's; if not, it has failed."""
        known = self._chunks.has(job.chunks)
        if not known:
            self._line.guard.tally.error("no such chunk")
            self._ended.put(job)
        return known

    def _hand(self, job: Job, work: _Work, move: Callable[[Job], None]) -> None:
        self._waiting[job.number] = job
        self._line.hand(work, functools.partial(self._do, job, move))

    def finished(self) -> list[Job]:
        """Jobs that have ended since the last call."""
        self._learn()
        self._line.guard.overdue()
        self._line.start_probe()
        now = time.monotonic()
        for job in list(self._waiting.values()):
            if not self._line.breaker.closed:  # nothing would be moved, and a call that hangs may keep a thread for ever
                self._give_up(job, "breaker")
            elif now > job.deadline:
                self._give_up(job)
        return [self._settle(job) for job in _drained(self._ended)]

    def _settle(self, job: Job) -> Job:
        del self._jobs[job.number]
        self._storing -= job.counted
        moved = set(itertools.compress(job.names, job.good.tolist()))
        if job.loads:
            self._questions.correct(set(job.names) - moved, False)
        else:
            self._questions.correct(moved, True)
        return job

    def step(self) -> None:
        """At the end of a step: asks what it wanted to know, in one question."""
        if names := self._questions.take():
            self._line.hand(self._line.readers, functools.partial(self._ask, names))

    def forget(self, request: str) -> None:
        """A request is over."""
        self._questions.forget(request)

    def stats(self) -> TierStats:
        """A snapshot."""
        return self._line.stats(self._storing, self._storing * self._chunks.nbytes)

    # -- threads of the tier

    def _ask(self, names: list[bytes]) -> None:
        found = np.zeros(len(names), bool)
        try:
            if self._line.breaker.closed and not self._closing:
                found = self._line.has(keys_of(self._namespace, names))
        finally:
            self._answers.put(dict(zip(names, found.tolist(), strict=True)))

    def _do(self, job: Job, move: Callable[[Job], None]) -> None:
        if self._waiting.pop(job.number, None) is None:
            return  # it was given up
        began = time.monotonic()
        try:
            move(job)
        finally:  # whatever happened: vLLM waits for it
            job.seconds = time.monotonic() - began
            self._ended.put(job)

    def _put(self, job: Job) -> None:
        line, size = self._line, self._chunks.nbytes
        keys = keys_of(self._namespace, job.names)
        job.good[:] = line.has(keys)
        rows = np.flatnonzero(~job.good)
        for some in self._batches(rows[self._offers.admitted(keys[rows])]):
            addresses, sizes = self._chunks.at(job.chunks[some]), np.full(len(some), size)
            digests = np.empty((len(some), DIGEST_BYTES), np.uint8)
            digest_records(addresses, sizes, digests)
            call = line.call(line.options.write_timeout_s)
            outcomes = line.guard.put_from(keys[some], addresses, sizes, digests, call)
            job.good[some] = good = outcomes == Outcome.OK
            job.nbytes += int(good.sum()) * size
            line.stored(keys[some][good])
            for outcome in set(outcomes.tolist()) - {int(Outcome.OK)}:
                line.guard.tally.drop(Outcome(outcome).name.lower(), int((outcomes == outcome).sum()))

    def _get(self, job: Job) -> None:
        line, size = self._line, self._chunks.nbytes
        keys = keys_of(self._namespace, job.names)
        for some in self._batches(np.arange(len(keys))):
            addresses, room = self._chunks.at(job.chunks[some]), np.full(len(some), size)
            found = line.guard.get_into(keys[some], addresses, room, line.call(line.options.read_timeout_s))
            job.good[some] = good = (found.outcomes == Outcome.OK) & (found.sizes == size)
            job.nbytes += int(good.sum()) * size
            line.stored(keys[some][good])
            line.lost(keys[some][np.isin(found.outcomes, (Outcome.MISS, Outcome.CORRUPT))])
            line.guard.tally.promote(int(good.sum()))

    def _batches(self, rows: Int64s) -> Iterator[Int64s]:
        """Parts of one call each, while the tier works and nobody wants the end."""
        options = self._line.options
        most = max(1, min(options.batch_blocks, options.batch_bytes // self._chunks.nbytes))
        for first in range(0, len(rows), most):
            if not self._line.breaker.closed or self._closing or (first and self._draining):
                return
            yield rows[first : first + most]

    # -- the rest

    def _learn(self) -> None:
        for answers in _drained(self._answers):
            self._questions.learn(answers)

    def _give_up(self, job: Job, why: str = "") -> None:
        """A job that no thread has begun."""
        if self._waiting.pop(job.number, None) is not None:
            if why and job.counted:
                self._line.guard.tally.drop(why, job.counted)
            self._ended.put(job)

    def drain(self) -> None:
        """Waits until no job runs. Those that have not ended after a while are given up: those that no thread has begun at
        once, others behind their first call, or the one that runs. All are among the next :meth:`finished`.

        Raises
        ------
        TransferTimeoutError
            One does not end: the pool's memory may still be read, or written.
        """
        self._flush()
        self._draining = True
        try:
            self._wait(self._is_idle, _DRAIN_S)
        finally:
            self._draining = False

    def _is_idle(self) -> bool:
        return self._ended.qsize() >= len(self._jobs)

    def _flush(self) -> None:
        """Waits a moment for all jobs; gives up those that no thread has begun then."""
        deadline = time.monotonic() + _FLUSH_S
        while not self._is_idle() and time.monotonic() < deadline:
            time.sleep(_NAP_S)
        for job in list(self._waiting.values()):
            self._give_up(job)

    def _wait(self, over: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not over():
            if time.monotonic() > deadline:
                names = ", ".join(str(number) for number in sorted(self._jobs))
                raise TransferTimeoutError(f"jobs {names} of tier {self._line.name} have not ended after {seconds} s")
            time.sleep(_NAP_S)

    def close(self) -> None:
        """Stores what waits, for a moment at most; then ends all threads, and closes the tier. Twice does no harm.

        Raises
        ------
        TransferTimeoutError
            A call of the tier does not come back: the pool's memory must stay.
        """
        if not self._closing:
            self._flush()
            self._end_threads()
        deadline = time.monotonic() + self._line.options.read_timeout_s + self._line.options.write_timeout_s
        for thread in self._line.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if left := [thread.name for thread in self._line.threads if thread.is_alive()]:
            raise TransferTimeoutError(f"{', '.join(left)}: calls of the tier have not come back; vLLM's pool must stay")
        self._line.tier.close()

    def _end_threads(self) -> None:
        self._closing = True
        for work, count in _threads(self._line):
            for _ in range(count):
                work.put(None)


def _threads(line: Line) -> Sequence[tuple[_Work, int]]:
    return (line.readers, line.options.read_threads), (line.writers, line.options.write_threads)


def _drained(given: queue.SimpleQueue[_Entry]) -> list[_Entry]:
    """What is in a queue now."""
    found: list[_Entry] = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(given.get_nowait())
    return found
