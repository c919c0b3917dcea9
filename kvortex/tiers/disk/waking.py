"""Which of a crew's threads takes a CPU when it wakes up: who may ask the disk for something, not who is to check what came."""

from __future__ import annotations

import contextlib
import os
import threading


class Waking:
    """Of threads that this one starts; under its crew's lock.

    A thread under SCHED_BATCH runs in its turn as others do, but takes no CPU from another by waking up (sched(7)). Linux often
    runs a thread that is woken where the one runs that wakes it, and at once: then whoever just had a record read, and woke a
    thread to check it, would ask for the next one when that is checked.
    """

    def __init__(self) -> None:
        try:
            self._usual = os.sched_getscheduler(0) == os.SCHED_OTHER  # else somebody chose it, and it is left alone
        except OSError:
            self._usual = False
        self._gentle: set[int] = set()

    def gently(self) -> None:
        """This thread, from now on."""
        thread = threading.get_native_id()
        if self._usual and thread not in self._gentle:
            self._gentle.add(thread)
            _schedule(thread, os.SCHED_BATCH)

    def as_usual(self) -> None:
        """All threads: the next one that is woken is to be quick."""
        while self._gentle:
            _schedule(self._gentle.pop(), os.SCHED_OTHER)

    def forget(self) -> None:
        """This thread, which ends: its number may be another's soon."""
        self._gentle.discard(threading.get_native_id())


def _schedule(thread: int, policy: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, policy, os.sched_param(0))
