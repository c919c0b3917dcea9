"""Threads that share the work of one call with the thread that makes it."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from kvortex.tiers.base import Call

Job = Callable[[Call], None]


class Crew:
    """Runs jobs on the caller's thread and up to ``threads - 1`` others.

    The caller works too, so a call gets on however busy the others are with those of other callers, and it comes back only
    when nobody touches its buffers any more.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0
        self._lock = threading.Lock()
        self._closed = False
        _ALL.add(self)

    def run(self, jobs: Sequence[Job], call: Call) -> None:
        """Each job once, unless an earlier one raised. A job is to notice deadline and cancellation by itself."""
        todo = deque(jobs)
        stopped = threading.Event()
        terms = Call(call.deadline, lambda: stopped.is_set() or call.cancelled())

        def work() -> None:
            while not stopped.is_set():
                try:
                    job = todo.popleft()
                except IndexError:
                    return
                job(terms)

        helpers: list[Future[None]] = []
        interrupt: BaseException | None = None
        try:
            for _ in range(min(len(jobs), self._threads) - 1):
                helpers.append(Future())  # before a thread has it: an interrupt must not come between
                self._submit(helpers[-1], work)
            work()
        except BaseException:
            stopped.set()
            raise
        finally:  # waits for those that have begun, through signals too: they write into the caller's memory
            while True:
                try:
                    wait([helper for helper in helpers if not helper.cancel()])
                    break
                except BaseException as error:  # KeyboardInterrupt: from now on they hurry
                    interrupt = error
                    stopped.set()
        if interrupt is not None:
            raise interrupt
        for helper in helpers:
            if not helper.cancelled():
                helper.result()

    def _submit(self, helper: Future[None], work: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                return
            if self._executor is None or self._process != os.getpid():
                self._executor, self._process = ThreadPoolExecutor(self._threads, f"kvortex-{self._name}"), os.getpid()
            with contextlib.suppress(RuntimeError):  # no thread is to be had, or the interpreter ends; or it comes later
                self._executor.submit(_help, helper, work)

    def close(self) -> None:
        """Ends the threads when they have done what they do. Twice does no harm."""
        with self._lock:
            self._closed = True
            executor, self._executor = self._executor, None
        if executor is not None and self._process == os.getpid():
            executor.shutdown(wait=True)


_ALL: weakref.WeakSet[Crew] = weakref.WeakSet()


def _start_anew() -> None:
    """Threads do not survive a fork, and a lock that one of them held would never be let go of."""
    for crew in list(_ALL):
        crew._lock, crew._executor = threading.Lock(), None


os.register_at_fork(after_in_child=_start_anew)


def _help(helper: Future[None], work: Callable[[], None]) -> None:
    """``work`` on another thread, unless its caller has given that up; then nobody may touch the caller's memory."""
    if not helper.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as error:
        helper.set_exception(error)
    else:
        helper.set_result(None)
