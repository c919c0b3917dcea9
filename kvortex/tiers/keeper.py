"""The thread that decides: what is put into its box is done in order by it alone, so what it decides on needs no lock."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable

Work = Callable[[], None]


class Keeper:
    """Does work in the order in which it was put there, and other work when it is due. Starts with the first work.

    Putting is a single step that takes no lock of Python's, so a finaliser or a signal's handler may do it anywhere.

    Parameters
    ----------
    tick
        Called after each work, and when it is due; says after how many seconds it wants to be called again, None for not
        before there is more work.
    failed
        Told of what work raised; the thread goes on.
    name
        Of the thread.
    """

    def __init__(self, tick: Callable[[], float | None], failed: Callable[[BaseException], None], name: str) -> None:
        self._box: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._tick, self._failed = tick, failed
        self._due: list[tuple[float, int, Work]] = []
        self._numbers = itertools.count()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Once."""
        self.thread.start()

    def put(self, work: Work) -> None:
        """Does not wait."""
        self._box.put(work)

    def at(self, when: float, work: Work) -> None:
        """Work to be done at ``when`` of ``time.monotonic()``; by the thread itself only."""
        heapq.heappush(self._due, (when, next(self._numbers), work))

    def backlog(self) -> int:
        """Works in the box."""
        return self._box.qsize()

    def stop(self) -> None:
        """Ends the thread after what is in the box."""
        self._box.put(None)

    def _run(self) -> None:
        wait: float | None = None
        while True:
            with contextlib.suppress(queue.Empty):
                work = self._box.get(timeout=wait)
                if work is None:
                    return
                self._do(work)
            while self._due and self._due[0][0] <= time.monotonic():
                self._do(heapq.heappop(self._due)[2])
            wait = self._next()

    def _next(self) -> float | None:
        try:
            wait = self._tick()
        except Exception as error:
            self._failed(error)
            wait = 1.0
        if self._due:
            until = max(0.0, self._due[0][0] - time.monotonic())
            wait = until if wait is None else min(wait, until)
        return None if wait is None else min(wait, threading.TIMEOUT_MAX)

    def _do(self, work: Work) -> None:
        try:
            work()
        except Exception as error:  # the others' work must not be lost with it
            self._failed(error)
