"""Threads that do the steps of many callers' batches, in turns, and callers that wait no longer than they must.

So many of a crew's threads at once have a turn on the disk. A thread whose turn has been had goes on with what another thread
has prepared meanwhile, and leaves what it got to that one: the disk does not wait until a thread is awake, nor until a record
is checked. With nothing prepared it finishes what it got itself.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.disk.pages import Pages
from kvortex.tiers.disk.waking import Waking

_LOOK = 0.02  # seconds between a waiting caller's looks at its ``cancelled``


class RefusedError(Exception):
    """The call of a turn was not made, and will not be."""

    def __init__(self, why: Outcome) -> None:
        super().__init__(why.name)
        self.why = why


class Turn:
    """What a step asks of the disk, and what is to be done about the answer.

    Parameters
    ----------
    call
        Made by a thread that has a turn, while others may wait for theirs: a system call, and nothing else.
    after
        Called with this turn then, by any thread of the crew; :meth:`done` tells it what became of the call.
    """

    __slots__ = ("_done", "_error", "_taken", "after", "batch", "call", "pages")
    batch: Batch  # of the crew's, as is ``pages``
    pages: Pages

    def __init__(self, call: Callable[[], int], after: Callable[[Turn], None]) -> None:
        self.call, self.after = call, after
        self._done, self._taken = 0, False
        self._error: BaseException | None = None

    def take(self) -> None:
        """Makes the call."""
        self._taken = True
        try:
            self._done = self.call()
        except BaseException as error:  # for ``after``; this thread is there for others too
            self._error = error

    def done(self) -> int:
        """What the call returned; raises what it raised, or :class:`RefusedError`."""
        if not self._taken:
            self.batch.why = self.batch.stopped or Outcome.CANCELLED
            raise RefusedError(self.batch.why)
        if self._error is not None:
            error, self._error = self._error, None  # whose traceback has this turn
            raise error
        return self._done


Step = Callable[[int, Pages], Turn | None]


class Batch:
    """One caller's steps. All but ``step`` and ``ended`` is guarded by the crew's lock."""

    def __init__(self, step: Step, count: int, call: Call) -> None:
        self.step, self.call = step, call
        self.begun, self.count, self.done = 0, count, 0
        self.stopped: Outcome | None = None  # why it is given up, if it is
        self.why = Outcome.OK  # the same, if anything was left undone
        self.error: BaseException | None = None
        self.ended = threading.Event()
        if not count:
            self.ended.set()


class Crew:
    """Threads that take one step of one batch at a time, so that a short batch does not wait for a long one.

    Parameters
    ----------
    turns
        Calls of :class:`Turn` that are made at once, at most.
    spare
        Steps that are prepared, or finished, beside those; there is a thread for each of either kind.
    name
        Of the threads.
    """

    def __init__(self, turns: int, spare: int, name: str) -> None:
        self._lock = threading.Lock()
        self._batches: deque[Batch] = deque()
        self._pages = [Pages() for _ in range(turns + spare)]  # each step that has begun has one of them
        self._free = turns  # turns that nobody has
        self._ready: deque[Turn] = deque()  # prepared
        self._had: deque[Turn] = deque()  # whose calls were made, and ``after`` was not called
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # in C: rung without the lock
        self._idle = 0  # threads that wait for it, or are about to
        self._closed = False
        self._recall = False  # whether some of what is prepared may be of a batch that was given up
        self._waking = Waking()
        threads = [threading.Thread(target=self._work, name=f"{name}-{at}", daemon=True) for at in range(turns + spare)]
        self._threads = threads
        for thread in threads:
            thread.start()

    def run(self, step: Step, count: int, call: Call) -> tuple[int, Outcome]:
        """Does ``step(0..count - 1, pages)`` in that order, several at once; returns how many were begun, and why no more.

        A step that gives a :class:`Turn` back ends with that, and until then has the pages for itself.

        What a step raises, which it should not, is raised here. What has not begun at the deadline, or when the call is
        cancelled, never begins. What has begun has ended when this returns, however it returns, and however long that
        takes.
        """
        batch = Batch(step, count, call)
        try:
            with self._lock:
                if self._closed:
                    return 0, Outcome.FAILED
                if count:
                    self._batches.append(batch)
                    self._wake(min(count, self._idle))
            given_up = False
            while not batch.ended.wait(_LOOK if given_up else min(call.left(), _LOOK)):
                if not given_up and (why := over(call)):
                    self._give_up(batch, why)
                    given_up = True
        finally:
            self._end(batch)
        if batch.error is not None:
            raise batch.error
        return batch.begun, batch.why

    def _end(self, batch: Batch) -> None:
        """Waits for what has begun, through interrupts too: it has the caller's memory in its hands."""
        interrupt: BaseException | None = None
        while True:
            try:
                if batch.ended.is_set():
                    break
                self._give_up(batch, Outcome.CANCELLED)  # of an interrupt; else it has ended
                batch.ended.wait()
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _give_up(self, batch: Batch, why: Outcome) -> None:
        with self._lock:
            self._stop(batch, why)

    def _stop(self, batch: Batch, why: Outcome) -> None:
        """May be interrupted anywhere, and is done again then: so nothing leaves one place here to be put into another."""
        batch.stopped = batch.stopped or why  # the first reason is the one
        if batch in self._batches:
            self._batches.remove(batch)
        if batch.begun < batch.count:
            batch.count, batch.why = batch.begun, batch.stopped
        if self._ready:
            self._recall = True
            self._wake(min(1, self._idle))
        if batch.done == batch.count:
            batch.ended.set()

    def _wake(self, threads: int) -> None:
        for _ in range(threads):
            self._bell.put(None)

    def _work(self) -> None:
        while self._do_something():
            pass

    def _do_something(self) -> bool:
        """Waits for it; False at the end."""
        with self._lock:
            self._idle += 1  # before it looks: who leaves something to do without the lock looks at this afterwards
            work, closed = self._find_work(), self._closed
            if work is not None or closed:
                self._idle -= 1
            elif not self._free:
                self._waking.gently()
            if work is None and closed:
                self._waking.forget()
        if work is not None:
            work()
            return True
        if closed:
            return False
        self._bell.get()
        with self._lock:
            self._idle -= 1
        return True

    def _find_work(self) -> Callable[[], None] | None:
        """First what keeps the disk at work, now and next. What is to be finished does not wait for ever: it keeps its pages,
        and there are no more of them than threads."""
        if self._recall:
            self._take_back()
        if self._free and self._ready:
            self._free -= 1
            return self._take_turns
        if self._batches and self._pages:
            return functools.partial(self._prepare, self._batches[0], self._pages.pop())
        if self._had:
            return functools.partial(self._finish, self._had.popleft())
        return None

    def _take_back(self) -> None:
        """Of a batch that was given up, no call need be made any more; on a disk that hangs it never might be."""
        self._recall = False
        for turn in list(self._ready):
            if turn.batch.stopped is not None:
                with contextlib.suppress(ValueError):  # somebody has just taken it
                    self._ready.remove(turn)
                    self._had.append(turn)

    def _prepare(self, batch: Batch, pages: Pages) -> None:
        """The next step of a batch, which goes to the end of the queue; or nothing."""
        try:
            why = over(batch.call)
        except Exception as error:  # of the caller's own ``cancelled``
            batch.error, why = error, Outcome.FAILED
        at = self._begin(batch, why)
        if at < 0:
            with self._lock:
                self._pages.append(pages)
            return
        try:
            turn = batch.step(at, pages)
        except BaseException as error:  # it is raised where the batch came from; this thread is there for others too
            batch.error, turn = error, None
        if turn is None:
            self._count(batch, pages)
            return
        turn.batch, turn.pages = batch, pages
        with self._lock:
            if self._closed and batch.stopped is None:
                batch.stopped = Outcome.FAILED  # there may soon be no thread that takes it back
            (self._ready if batch.stopped is None else self._had).append(turn)

    def _begin(self, batch: Batch, why: Outcome | None) -> int:
        """The number of the step; -1 where there is none."""
        with self._lock:
            if why is not None:
                self._stop(batch, why)
                return -1
            if batch.begun >= batch.count:
                return -1
            at = batch.begun
            batch.begun += 1
            if batch in self._batches:
                self._batches.remove(batch)
                if batch.begun < batch.count:
                    self._batches.append(batch)
            return at

    def _take_turns(self) -> None:
        """One after another, while there are any. Between two of them the disk waits: nothing else is done there."""
        turn = self._next_turn()
        while turn is not None:
            if turn.batch.stopped is None:
                turn.take()
            following = self._next_turn()
            if following is None:
                return self._finish(turn)
            self._had.append(turn)
            if self._idle:
                self._bell.put(None)
            turn = following

    def _next_turn(self) -> Turn | None:
        """The one that waits longest; None, and this thread may take no more, where there is none."""
        try:
            return self._ready.popleft()
        except IndexError:
            pass
        with self._lock:  # who prepares one looks under it whether anybody will take it
            try:
                return self._ready.popleft()
            except IndexError:
                self._free += 1
                self._waking.as_usual()
                return None

    def _finish(self, turn: Turn) -> None:
        try:
            turn.after(turn)
        except BaseException as error:
            turn.batch.error = error
        self._count(turn.batch, turn.pages)

    def _count(self, batch: Batch, pages: Pages) -> None:
        """One step more has ended."""
        with self._lock:
            self._pages.append(pages)
            batch.done += 1
            if batch.done == batch.count:
                batch.ended.set()

    def close(self, timeout: float) -> bool:
        """Gives up what has not begun, and ends the threads; False where one of them does not end in time."""
        with self._lock:
            self._closed = True
            # What is prepared too, while there are threads to take it back.
            for batch in [*self._batches, *(turn.batch for turn in self._ready)]:
                self._stop(batch, Outcome.FAILED)
            self._wake(len(self._threads))
        ends = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def over(call: Call) -> Outcome | None:
    """Why a call is to begin nothing more; None while it may."""
    if call.cancelled():
        return Outcome.CANCELLED
    return None if call.left() else Outcome.TIMEOUT
