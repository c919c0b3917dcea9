"""What a library costs the process that uses it: CPU seconds of the calls into it, and of the threads that it has."""

from __future__ import annotations

import threading
import time
from typing import Any

import kvortex
from kvortex.keys import KeySequence


class Meter:
    """Stands before an engine, or what its calls give, and counts the CPU seconds of calls by the calling thread.

    What else such a call causes, misses of the model in caches that a copy has filled say, is in no such figure.
    """

    def __init__(self, metered: Any, spent: list[float] | None = None) -> None:
        self._metered, self._spent = metered, [0.0] if spent is None else spent

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._metered, name)
        return self._timed(found) if callable(found) else found

    def _timed(self, call: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                given = call(*arguments, **named)
            finally:
                self._spent[0] += time.thread_time() - began
            return Meter(given, self._spent) if isinstance(given, kvortex.Ticket | KeySequence) else given

        return timed


def calls_of(meter: Meter) -> float:
    """CPU seconds of all calls so far."""
    return meter._spent[0]


def threads_of(prefix: str) -> float:
    """CPU seconds of the threads that run, and whose names begin so."""
    found = 0.0
    for thread in threading.enumerate():
        if thread.name.startswith(prefix) and thread.ident is not None:
            try:
                found += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            except OSError:  # it ended meanwhile
                continue
    return found
