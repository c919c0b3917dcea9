"""Transfers without a pause: two in flight, and both directions at once."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import kvortex
from kvortex.errors import TransferError, TransferTimeoutError
from kvortex.transfer.executor import poll
from perf.pages import moved
from perf.raw import RawCopy

LEAST_TRANSFERS = 4  # of each direction
LONGEST_S = 60.0  # for that many; and where a method may be too slow to be compared
PATIENCE_S = 8.0
_NAP_S = 50e-6
Running: TypeAlias = "tuple[Callable[[], bool], Callable[[], int]]"  # whether it has ended; waits for that and gives its bytes


class NothingMeasuredError(TransferError):
    """Too few transfers ended while others ran."""


class TwoInFlight:
    """Transfers in one direction: another one is started whenever less than two run."""

    def __init__(self, start: Callable[[], Running]) -> None:
        self._start = start
        self._running: list[Running] = []

    def __call__(self) -> int:
        """Starts a transfer, waits for the one before it, and gives the bytes of that one; 0 the first time."""
        self._running.append(self._start())
        return self._finish() if len(self._running) > 1 else 0

    def step(self) -> int:
        """Sees to it that two run; the bytes of one that has ended, else 0. Does not wait."""
        nbytes = self._finish() if len(self._running) > 1 and self._running[0][0]() else 0
        while len(self._running) < 2:
            self._running.append(self._start())
        return nbytes

    def drain(self) -> None:
        """Waits for all that runs, also where some of it failed."""
        if self._running:
            try:
                self._finish()
            finally:
                self.drain()

    def _finish(self) -> int:
        return self._running.pop(0)[1]()


def tickets(start: Callable[[], kvortex.Ticket]) -> TwoInFlight:
    """Transfers of an engine."""

    def one() -> Running:
        ticket = start()
        return ticket.done, lambda: moved(ticket).nbytes

    return TwoInFlight(one)


def copies(raw: RawCopy, *, to_host: bool) -> TwoInFlight:
    """Contiguous copies."""

    def one() -> Running:
        ended = raw.start(to_host=to_host)
        return ended, partial(_finish, ended, raw.nbytes)

    return TwoInFlight(one)


def _finish(ended: Callable[[], bool], nbytes: int) -> int:
    if not poll(ended, time.monotonic() + LONGEST_S):
        raise TransferTimeoutError(f"a contiguous copy was not done after {LONGEST_S} s")
    return nbytes


Stamps: TypeAlias = "list[tuple[float, int]]"  # when a transfer had ended, and its bytes


def side_by_side(flows: Mapping[str, TwoInFlight], seconds: float) -> dict[str, float]:
    """Keeps all flows going from one thread; GB/s of each while all of them ran. See :func:`at_once`."""
    stamps: dict[str, Stamps] = {name: [] for name in flows}
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for flow in flows.values():
            stack.callback(flow.drain)
        while _goes_on(stamps, began, seconds):
            ended = 0
            for name, flow in flows.items():
                if nbytes := flow.step():
                    stamps[name].append((time.perf_counter(), nbytes))
                    ended += 1
            if not ended:
                time.sleep(_NAP_S)
    return rates(stamps)


def _goes_on(stamps: Mapping[str, Stamps], began: float, seconds: float, longest: float = LONGEST_S) -> bool:
    spent = time.monotonic() - began
    return spent < seconds or (spent < longest and min(map(len, stamps.values())) < LEAST_TRANSFERS)


def at_once(moves: Mapping[str, Callable[[], int]], seconds: float) -> dict[str, float]:
    """Calls functions that block, each again and again in a thread of its own; GB/s of each while all of them ran.

    Parameters
    ----------
    moves
        Each call gives the bytes that it has seen arrive.
    seconds
        As long at least, and until :data:`LEAST_TRANSFERS` of each have ended.

    Raises
    ------
    TransferError
        A transfer failed, or too few of them ended while all ran.
    """
    stamps: dict[str, Stamps] = {name: [] for name in moves}
    errors: list[BaseException] = []
    stop = threading.Event()

    def run(name: str) -> None:
        try:
            while not stop.is_set():
                if nbytes := moves[name]():
                    stamps[name].append((time.perf_counter(), nbytes))
        except BaseException as error:  # for the caller to raise
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(name,), name=f"perf-{name}") for name in moves]
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        while _goes_on(stamps, began, seconds, PATIENCE_S) and not stop.wait(0.01):
            pass
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return rates(stamps)


def rates(stamps: Mapping[str, Stamps]) -> dict[str, float]:
    """GB/s of each row of transfers, between the first and the last that ended while all rows ran."""
    ends = list(stamps.values())
    if not all(ends):
        missing = " and no ".join(name for name, row in stamps.items() if not row)
        raise NothingMeasuredError(f"no {missing} ended: nothing was measured")
    began, ended = max(row[0][0] for row in ends), min(row[-1][0] for row in ends)
    found = {}
    for name, row in stamps.items():
        inside = [stamp for stamp in row if began <= stamp[0] <= ended]
        if len(inside) < 2:
            raise NothingMeasuredError(f"{name}: fewer than two transfers ended while the others ran: nothing was measured")
        found[name] = sum(nbytes for _, nbytes in inside[1:]) / (inside[-1][0] - inside[0][0]) / 1e9
    return found


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """The median of each value over several measurements."""
    return {name: statistics.median(one[name] for one in found) for name in found[0]}
