"""Who issues a plan: its caller's thread, or, where that takes many calls of the driver, a thread that never holds the GIL.

A call of the driver takes a microsecond or a few, and a long transfer a hundred of them. A lane has a thread that does nothing
but wait for plans, by a semaphore of the C library, and issue them, all in compiled code: that its caller's Python goes on, or
that others fight for the GIL, is nothing to it. Short plans are issued at once, since waking a thread would take longer.

A plan waits as a row of memory that holds the arguments of the function which issues it; who submits it keeps their arrays
until it is issued.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import numpy as np

from kvortex.devices.native import call, load_tuple, release, store_tuple
from kvortex.devices.threads import Mutex, Semaphore, busy_address
from kvortex.errors import TransferTimeoutError
from kvortex.jit import njit
from kvortex.transfer.executor import poll
from kvortex.transfer.issue.cells import LANE_CELLS, OUTCOME_CELLS, PACED, QUEUED
from kvortex.transfer.issue.holding import issue_holding, issue_resident_holding
from kvortex.transfer.issue.pacing import hurry
from kvortex.transfer.plan import Int64s

_CAPACITY = 256  # plans that wait
_ROW_WORDS = 256
_STOP, STREAMED, RESIDENT = range(3)  # what a row's first word says
_PUSHED, _TAKEN = range(2)  # cells of ``counts``
_LOCK, _TRY, _UNLOCK = 1, 2, 3  # cells of a Mutex
_WAIT, _POST = 1, 2  # cells of a Semaphore
_JOIN_S, _ROOM_S = 10.0, 60.0


@njit(nogil=True)
def _streamed(mutex, how, job):  # type: ignore[no-untyped-def]
    """Issues a job with the lock that ``how`` takes, or not; whether it did."""
    if call(mutex[how], (mutex[0],)):
        return False
    issue_holding(job[0], job[1], job[2], job[3], job[4:])
    call(mutex[_UNLOCK], (mutex[0],))
    return True


@njit(nogil=True)
def _resident(mutex, how, job):  # type: ignore[no-untyped-def]
    if call(mutex[how], (mutex[0],)):
        return False
    issue_resident_holding(job[0], job[1], job[2], job[3:])
    call(mutex[_UNLOCK], (mutex[0],))
    return True


@njit()
def _queue(semaphore, counts, rows, lane, kind, job, like):  # type: ignore[no-untyped-def]
    """Leaves a job in a row; whether there was room. Holds the GIL, so that no two threads are in here at a time.

    Where there is none, what waits is not paced any more. Nor is what is ahead of a job that is not: a short one may not need
    what they wait for.
    """
    if counts[_PUSHED] - counts[_TAKEN] >= len(rows):
        hurry(lane, counts[_PUSHED])
        return False
    row = rows[counts[_PUSHED] % len(rows)]
    row[0] = kind
    store_tuple(row[1:].ctypes.data, job, like)
    counts[_PUSHED] += 1
    job[-1][QUEUED] = counts[_PUSHED]
    if not job[-1][PACED]:
        hurry(lane, counts[_PUSHED])
    call(semaphore[_POST], (semaphore[0],))
    return True


@njit()
def _size(rows, job, like):  # type: ignore[no-untyped-def]
    return store_tuple(rows.ctypes.data, job, like)


@njit(nogil=True)
def _serve(mutex, semaphore, counts, rows, streamed, resident):  # type: ignore[no-untyped-def]
    """Issues what is left in rows, until it finds ``_STOP``. ``streamed`` and ``resident`` are jobs, for their types alone."""
    while True:
        while call(semaphore[_WAIT], (semaphore[0],)):
            pass  # a signal, which another thread sees to
        row = rows[counts[_TAKEN] % len(rows)]
        kind = row[0]
        if kind == STREAMED:
            _streamed(mutex, _LOCK, load_tuple(row[1:].ctypes.data, streamed))
        elif kind == RESIDENT:
            _resident(mutex, _LOCK, load_tuple(row[1:].ctypes.data, resident))
        release()  # the row is read before it is free
        counts[_TAKEN] += 1
        if kind == _STOP:
            return


def _like(shape: str) -> tuple[Any, ...]:
    """Arguments of the types that a shape tells: ``i`` a number, ``1`` and ``2`` an array of so many dimensions. The last one
    has the cells of an outcome."""
    return tuple(0 if letter == "i" else np.zeros((OUTCOME_CELLS,) * int(letter), np.int64) for letter in shape)


# In front of the arguments of ``issue`` and ``issue_resident``, those of ``issue_holding`` and ``issue_resident_holding``.
_STREAMED_LIKE = _like("i111" + "1111121i1ii222i1112111111")
_RESIDENT_LIKE = _like("111" + "111i111121i1ii22i1121121111")
_NOTHING = _like("1")


def _run(mutex: Mutex, semaphore: Semaphore, counts: Int64s, rows: Int64s) -> None:
    """The thread. It keeps what it works with, whatever becomes of who started it."""
    _serve(mutex.cells, semaphore.cells, counts, rows, _STREAMED_LIKE, _RESIDENT_LIKE)


@functools.cache
def load_compiled() -> None:
    """Loads all that is compiled, once in a process, and not in a thread beside others: that would hold Numba's lock while the
    process forks, or run finalisers which wait for that very thread."""
    mutex, semaphore, counts = Mutex(), Semaphore(), np.zeros(2, np.int64)
    rows, lane = np.zeros((1, 4 * _ROW_WORDS), np.int64), np.zeros(LANE_CELLS, np.int64)
    hurry(lane, 0)
    for like in (_STREAMED_LIKE, _RESIDENT_LIKE):
        if _size(rows, like, like) > 8 * (_ROW_WORDS - 1):
            raise RuntimeError("a row is too short for a job")
    _queue(semaphore.cells, counts, rows, lane, _STOP, _NOTHING, _NOTHING)
    for kind, like in ((STREAMED, _STREAMED_LIKE), (RESIDENT, _RESIDENT_LIKE)):
        _queue(semaphore.cells, counts, rows, lane, kind, like, like)  # which finds no room
    _run(mutex, semaphore, counts, rows)
    taken = np.array([0, *[busy_address()] * 3])
    _streamed(taken, _TRY, _STREAMED_LIKE)
    _resident(taken, _TRY, _RESIDENT_LIKE)


class Submitter:
    """The thread of a lane, and its lock.

    Parameters
    ----------
    name
    lane : (LANE_CELLS,) int64
        What it says of who is hurried (:mod:`kvortex.transfer.issue.pacing`).
    """

    def __init__(self, name: str, lane: Int64s) -> None:
        load_compiled()
        self._lane = lane
        self._mutex, self._semaphore = Mutex(), Semaphore()
        self._counts, self._rows = np.zeros(2, np.int64), np.zeros((_CAPACITY, _ROW_WORDS), np.int64)
        serving = self._mutex, self._semaphore, self._counts, self._rows
        self._thread = threading.Thread(target=_run, args=serving, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:  # an interrupt: it may run
            self._leave(_STOP, _NOTHING, _NOTHING)
            raise

    def issue(self, kind: int, job: tuple[Any, ...]) -> bool:
        """Issues a job on this thread, unless another one is issuing: whoever waited for that could not be interrupted.

        Parameters
        ----------
        kind
            ``STREAMED`` or ``RESIDENT``.
        job
            Arguments of ``issue_holding`` or ``issue_resident_holding``, in one row.

        Returns
        -------
        bool
            Whether it did.
        """
        return bool((_streamed if kind == STREAMED else _resident)(self._mutex.cells, _TRY, job))

    def leave(self, kind: int, job: tuple[Any, ...]) -> None:
        """Leaves a job to the lane's thread.

        Parameters
        ----------
        kind
        job
            The caller keeps its arrays until the last of them, the outcome, says that it is issued. The cell ``QUEUED`` of
            that is set at once, to its place in the queue.

        Raises
        ------
        TransferTimeoutError
            The driver does not take what is waiting already; nothing was left.
        """
        like = _STREAMED_LIKE if kind == STREAMED else _RESIDENT_LIKE
        if not poll(lambda: self._leave(kind, job, like), time.monotonic() + _ROOM_S):
            raise TransferTimeoutError(f"{_CAPACITY} transfers wait to be issued, and none was within {_ROOM_S} s")

    def _leave(self, kind: int, job: tuple[Any, ...], like: tuple[Any, ...]) -> bool:
        return bool(_queue(self._semaphore.cells, self._counts, self._rows, self._lane, kind, job, like))

    @property
    def idle(self) -> bool:
        """Whether nothing is left to it."""
        return bool(self._counts[_PUSHED] == self._counts[_TAKEN])

    def close(self) -> None:
        """Ends the thread, which has nothing left to do by then. A second call does nothing.

        Raises
        ------
        TransferTimeoutError
            It does not end: the driver does not return from a call.
        """
        if self._thread.is_alive():
            poll(lambda: self._leave(_STOP, _NOTHING, _NOTHING), time.monotonic() + _JOIN_S)
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise TransferTimeoutError(f"the thread that issues transfers did not end within {_JOIN_S} s")
