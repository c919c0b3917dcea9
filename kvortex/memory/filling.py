"""Faulting memory in by several threads, from its beginning on, so that the beginning can be used while the rest follows."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading

TOUCH_BYTES = 64 << 20  # at a time: tens of milliseconds, which is how long it takes to stop
_MOST_THREADS = 16


class Filler:
    """Writes zeros over a range, which makes its pages resident. ``memset`` through ctypes holds no GIL.

    Parameters
    ----------
    address, nbytes
        Nobody else may write there before :meth:`wait` says that it is done.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._address, self._nbytes = address, nbytes
        self._turns = itertools.count()  # handing out a number is one step of the interpreter, so it needs no lock
        self._done = [False] * -(-nbytes // TOUCH_BYTES)
        self._first = 0  # so many parts from the beginning on are done
        self._news = threading.Condition()
        self._stopped = False
        # Daemons: an interpreter that ends stops them through whoever owns the memory, and not by waiting for the whole.
        self._threads = [
            threading.Thread(target=self._run, name="kvortex-fill", daemon=True)
            for _ in range(min(_MOST_THREADS, os.cpu_count() or 1, len(self._done)))
        ]

    def start(self) -> None:
        """Begins. After an interrupt in here, :meth:`close` stops what runs."""
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped and (turn := next(self._turns)) < len(self._done):
                start = turn * TOUCH_BYTES
                ctypes.memset(self._address + start, 0, min(TOUCH_BYTES, self._nbytes - start))
                self._tell(turn)
        except BaseException:  # a part will never be done, and nobody should wait for it
            self._stop()
            raise

    def _tell(self, turn: int) -> None:
        with self._news:
            self._done[turn] = True
            while self._first < len(self._done) and self._done[self._first]:
                self._first += 1
            self._news.notify_all()

    def _stop(self) -> None:
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def wait(self, end: int) -> bool:
        """Blocks until the first ``end`` bytes are resident; False if it was stopped before."""
        wanted = -(-end // TOUCH_BYTES)
        with self._news:
            self._news.wait_for(lambda: self._stopped or self._first >= wanted)
        return self._first >= wanted

    def is_current(self) -> bool:
        """Whether the calling thread is one of those that write."""
        return threading.current_thread() in self._threads

    def close(self) -> None:
        """Stops, and waits until no thread writes any more. Not to be called by one of them."""
        self._stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
