"""Threads that do the steps of many callers' batches, in turns, and callers that wait no longer than they must."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from kvortex.tiers.base import Call, Outcome
from kvortex.tiers.disk.pages import Pages

Step = Callable[[int, Pages], None]
_LOOK = 0.02  # seconds between a waiting caller's looks at its ``cancelled``


class Batch:
    """One caller's steps. All but ``step`` and ``ended`` is guarded by the crew's lock."""

    def __init__(self, step: Step, count: int, call: Call) -> None:
        self.step, self.call = step, call
        self.begun, self.count, self.done = 0, count, 0
        self.why = Outcome.OK  # why it was given up, if it was
        self.error: Exception | None = None
        self.ended = threading.Event()
        if not count:
            self.ended.set()


class Crew:
    """Threads that take one step of one batch at a time, so that a short batch does not wait for a long one.

    Parameters
    ----------
    threads
    name
        Of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._news = threading.Condition(threading.Lock())
        self._batches: deque[Batch] = deque()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{at}", daemon=True) for at in range(threads)]
        for thread in self._threads:
            thread.start()

    def run(self, step: Step, count: int, call: Call) -> tuple[int, Outcome]:
        """Does ``step(0..count - 1, pages)`` in that order, several at once; returns how many were begun, and why no more.

        What a step raises, which it should not, is raised here. What has not begun at the deadline, or when the call is
        cancelled, never begins. What has begun has ended when this returns, however it returns, and however long that
        takes.
        """
        batch = Batch(step, count, call)
        try:
            with self._news:
                if self._closed:
                    return 0, Outcome.FAILED
                if count:
                    self._batches.append(batch)
                    self._news.notify(count)
            while not batch.ended.wait(min(call.left(), _LOOK)):
                if why := over(call):
                    self._give_up(batch, why)
                    break
        finally:
            self._end(batch)
        if batch.error is not None:
            raise batch.error
        return batch.begun, batch.why

    def _end(self, batch: Batch) -> None:
        """Waits for what has begun, through interrupts too: it has the caller's memory in its hands."""
        interrupt: BaseException | None = None
        while not batch.ended.is_set():
            try:
                self._give_up(batch, Outcome.CANCELLED)  # of an interrupt; else there is nothing to give up
                batch.ended.wait()
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _give_up(self, batch: Batch, why: Outcome) -> None:
        with self._news:
            self._stop(batch, why)

    def _stop(self, batch: Batch, why: Outcome) -> None:
        if batch.begun < batch.count:
            batch.count, batch.why = batch.begun, why
            if batch in self._batches:
                self._batches.remove(batch)
        if batch.done == batch.count:
            batch.ended.set()

    def _work(self) -> None:
        pages = Pages()
        while True:
            with self._news:
                while not self._batches:
                    if self._closed:
                        return
                    self._news.wait()
                batch = self._batches[0]
            try:
                why = over(batch.call)
            except Exception as error:  # of the caller's own ``cancelled``
                batch.error, why = error, Outcome.FAILED
            at = self._begin(batch, why)
            if at < 0:
                continue
            try:
                batch.step(at, pages)
            except Exception as error:
                batch.error = error
            finally:
                with self._news:
                    batch.done += 1
                    if batch.done == batch.count:
                        batch.ended.set()

    def _begin(self, batch: Batch, why: Outcome | None) -> int:
        """The next step of a batch, which goes to the end of the queue; -1 where there is none."""
        with self._news:
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

    def close(self, timeout: float) -> bool:
        """Gives up what has not begun, and ends the threads; False where one of them does not end in time."""
        with self._news:
            self._closed = True
            for batch in list(self._batches):
                self._stop(batch, Outcome.FAILED)
            self._news.notify_all()
        ends = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def over(call: Call) -> Outcome | None:
    """Why a call is to begin nothing more; None while it may."""
    if call.cancelled():
        return Outcome.CANCELLED
    return None if call.left() else Outcome.TIMEOUT
