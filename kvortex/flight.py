"""Transfers under way, and what becomes of their slots when each one ends."""

from __future__ import annotations

import threading
import time

import numpy as np

from kvortex.index import BlockIndex
from kvortex.stats import Counters
from kvortex.transfer.executor import Direction, poll
from kvortex.transfer.plan import Int64s
from kvortex.transfer.ticket import Transfer


class Flight:
    """The transfers of one engine that have not been settled. Thread-safe.

    Nothing here runs by itself: a transfer is settled by the first call that finds it ended, be it its ticket's or the
    engine's next. Until then nobody could have noticed.
    """

    def __init__(self, index: BlockIndex, counters: Counters) -> None:
        self._index, self._counters = index, counters
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}

    def add(self, transfer: Transfer) -> None:
        """Takes charge of a transfer's slots."""
        with self._lock:
            self._transfers[id(transfer)] = transfer

    def settle(self, transfer: Transfer) -> bool:
        """Whether a transfer has ended; the first call that finds so makes its blocks visible or releases them."""
        with transfer.lock:
            if transfer.settled:
                return True
            if not all([self.settle(save) for save, _, _ in transfer.after]):
                return False
            completion = transfer.completion
            if completion is not None and not completion.query():
                return False
            self._close(transfer)
            transfer.settled = True
        with self._lock:
            self._transfers.pop(id(transfer), None)
        return True

    def _close(self, transfer: Transfer) -> None:
        completion, count = transfer.completion, len(transfer.moved)
        failed = completion is not None and completion.error is not None
        if failed:
            transfer.mask[transfer.moved] = False
            self._counters.fail(count)
        elif completion is not None:
            self._counters.transfer(transfer.direction, count, transfer.nbytes, completion.seconds)
        if transfer.direction is Direction.LOAD:
            self._index.release(transfer.slots)
        elif failed:
            self._index.abort(transfer.slots)
        else:
            self._index.commit(transfer.slots)
        for save, here, there in transfer.after:
            transfer.mask[here] = save.mask[there]
        transfer.after.clear()

    def reap(self) -> None:
        """Settles whatever has ended."""
        with self._lock:
            transfers = list(self._transfers.values())
        for transfer in transfers:
            self.settle(transfer)

    def saves_into(self, slots: Int64s) -> list[tuple[Transfer, int] | None]:
        """For each slot, the running save that writes it and the position in that save's mask; None once it has ended."""
        with self._lock:
            saves = [t for t in self._transfers.values() if t.direction is Direction.SAVE]
        found: list[tuple[Transfer, int] | None] = []
        for slot in slots:
            hits = ((save, np.flatnonzero(save.slots == slot)) for save in saves)
            found.append(next(((save, int(save.moved[at[0]])) for save, at in hits if len(at)), None))
        return found

    def drain(self, timeout: float) -> int:
        """Settles everything, waiting up to ``timeout`` seconds; the number of transfers that still run."""
        poll(self._empty, time.monotonic() + timeout)
        with self._lock:
            return len(self._transfers)

    def _empty(self) -> bool:
        self.reap()
        with self._lock:
            return not self._transfers
