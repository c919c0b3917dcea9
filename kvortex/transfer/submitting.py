"""Who issues a plan: its caller's thread, or, where that takes many calls of the driver, a thread that never holds the GIL.

A call of the driver takes a microsecond or a few, and a long transfer a hundred of them. A lane has a thread that does nothing
but wait for plans, by a semaphore of the C library, and issue them, all in compiled code: that its caller's Python goes on, or
that others fight for the GIL, is nothing to it. Short plans are issued at once, since waking a thread would take longer.

A plan waits as a row of memory that holds the arguments of the function which issues it; who submits it keeps their arrays
until it is issued.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import njit

from kvortex.devices.native import call, load_tuple, store_tuple
from kvortex.devices.threads import Mutex, Semaphore
from kvortex.errors import TransferTimeoutError
from kvortex.transfer.holding import issue_holding, issue_resident_holding
from kvortex.transfer.issue import QUEUED

_CAPACITY = 256  # plans that wait; who finds no room issues his himself
_ROW_WORDS = 256
_STOP, STREAMED, RESIDENT = range(3)  # what a row's first word says
_PUSHED, _TAKEN = range(2)  # cells of ``counts``
_LOCK, _UNLOCK = 1, 2  # cells of a Mutex
_WAIT, _POST = 1, 2  # cells of a Semaphore
_JOIN_S = 10.0


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _streamed(mutex, job):  # type: ignore[no-untyped-def]
    call(mutex[_LOCK], (mutex[0],))
    issue_holding(job[0], job[1], job[2], job[3], job[4:])
    call(mutex[_UNLOCK], (mutex[0],))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _resident(mutex, job):  # type: ignore[no-untyped-def]
    call(mutex[_LOCK], (mutex[0],))
    issue_resident_holding(job[0], job[1], job[2], job[3:])
    call(mutex[_UNLOCK], (mutex[0],))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _queue(semaphore, counts, rows, kind, job, like):  # type: ignore[no-untyped-def]
    """Leaves a job in a row; whether there was room. Holds the GIL, so that no two threads are in here at a time."""
    if counts[_PUSHED] - counts[_TAKEN] >= len(rows):
        return False
    row = rows[counts[_PUSHED] % len(rows)]
    row[0] = kind
    if store_tuple(row[1:].ctypes.data, job, like) > 8 * (len(row) - 1):
        return False
    job[-1][QUEUED] = 1
    counts[_PUSHED] += 1
    call(semaphore[_POST], (semaphore[0],))
    return True


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _serve(mutex, semaphore, counts, rows, streamed, resident):  # type: ignore[no-untyped-def]
    """Issues what is left in rows, until it finds ``_STOP``. ``streamed`` and ``resident`` are jobs, for their types alone."""
    while True:
        while call(semaphore[_WAIT], (semaphore[0],)):
            pass  # a signal, which another thread sees to
        row = rows[counts[_TAKEN] % len(rows)]
        kind = row[0]
        if kind == STREAMED:
            _streamed(mutex, load_tuple(row[1:].ctypes.data, streamed))
        elif kind == RESIDENT:
            _resident(mutex, load_tuple(row[1:].ctypes.data, resident))
        counts[_TAKEN] += 1
        if kind == _STOP:
            return


def _like(shape: str) -> tuple[Any, ...]:
    """Arguments of the types that a shape tells: ``i`` a number, ``1`` and ``2`` an array of so many dimensions."""
    return tuple(0 if letter == "i" else np.zeros((4,) * int(letter), np.int64) for letter in shape)


# In front of the arguments of ``issue`` and ``issue_resident``, those of ``issue_holding`` and ``issue_resident_holding``.
_STREAMED_LIKE = _like("i111" + "1111111i1ii222i11i1111")
_RESIDENT_LIKE = _like("111" + "111i111121i1ii22i11211111")


_NOTHING = _like("1")


class Submitter:
    """The thread of a lane, and its lock."""

    def __init__(self, name: str) -> None:
        self._mutex, self._semaphore = Mutex(), Semaphore()
        self._counts, self._rows = np.zeros(2, np.int64), np.zeros((_CAPACITY, _ROW_WORDS), np.int64)
        serving = (self._mutex.cells, self._semaphore.cells, self._counts, self._rows, _STREAMED_LIKE, _RESIDENT_LIKE)
        self._thread = threading.Thread(target=_serve, args=serving, name=name, daemon=True)
        self._thread.start()

    def submit(self, kind: int, job: tuple[Any, ...], *, at_once: bool) -> None:
        """Issues a job, on this thread (``at_once``), or soon on its own.

        Parameters
        ----------
        kind
            ``STREAMED`` or ``RESIDENT``.
        job
            Arguments of ``issue_holding`` or ``issue_resident_holding``, in one row. Of what is issued later the caller keeps
            the arrays until the last of them, the outcome, says that it is issued: its cell ``QUEUED`` is set at once.
        """
        like = _STREAMED_LIKE if kind == STREAMED else _RESIDENT_LIKE
        if not at_once and _queue(self._semaphore.cells, self._counts, self._rows, kind, job, like):
            return
        (_streamed if kind == STREAMED else _resident)(self._mutex.cells, job)

    def close(self) -> None:
        """Ends the thread, which has nothing left to do by then. A second call does nothing.

        Raises
        ------
        TransferTimeoutError
            It does not end: the driver does not return from a call.
        """
        if self._thread.is_alive():
            _queue(self._semaphore.cells, self._counts, self._rows, _STOP, _NOTHING, _NOTHING)
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise TransferTimeoutError(f"the thread that issues transfers did not end within {_JOIN_S} s")
