"""The executor of the host device: threads that copy between RAM and RAM."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from kvortex.devices.host import HostEvent, HostStream
from kvortex.devices.native import memcpy_address
from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError
from kvortex.transfer.copies import copy_buffers, copy_paged
from kvortex.transfer.executor import Completion, Direction, Executor
from kvortex.transfer.plan import Int64s, Pool

_LEAST_RECORDS_A_THREAD = 4
_Part: TypeAlias = Callable[[], None]


class HostCompletion(Completion):
    """A transfer in parts that several threads work on; done when the last one is.

    Parameters
    ----------
    work
        Queue of the threads.
    parts
        What is to be done.
    stream
        To be started behind, or None.
    """

    route = "host"

    def __init__(self, work: queue.SimpleQueue[_Part | None], parts: list[_Part], stream: HostStream | None) -> None:
        self._work, self._parts, self._stream = work, parts, stream
        self._left = len(parts)
        self._lock = threading.RLock()
        self._done = HostEvent()
        self._began: float | None = None

    def start(self) -> None:
        if self._stream is None:
            self._enqueue()
        else:
            before, self._stream = self._stream.record(), None
            before.when_set(lambda: self._enqueue(before))  # no thread waits, so transfers cannot block each other
        self.started = True

    def _enqueue(self, before: HostEvent | None = None) -> None:
        if before is not None and before.error is not None:
            self._drop(TransferError(f"the work that it waited for raised {before.error!r}"))
        for _ in range(len(self._parts)):
            self._work.put(self._run)

    def cancel(self) -> None:
        self._drop(TransferError("the call was interrupted before all of it was issued"))
        self.started = True

    def _drop(self, error: TransferError) -> None:
        while self._parts:
            self._run(error)

    def _run(self, error: TransferError | None = None) -> None:
        """One thread does one part, or hears that it will not be done."""
        try:
            part = self._parts.pop()  # atomic: each part goes to one thread
        except IndexError:  # cancelled
            return
        with self._lock:
            self._began = self._began or time.perf_counter()
        if error is None:
            try:
                part()
            except Exception as failure:  # the waiter must hear of whatever went wrong in this thread
                error = TransferError(f"a host copy failed: {failure}")
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            last = self._left == 0
            self.seconds = time.perf_counter() - self._began
        if last:
            self._done.set()

    def query(self) -> bool:
        return self._done.query()

    def add_to(self, stream: Any, timeout: float) -> None:
        check_stream(stream)
        if stream is not None:
            stream.wait(self._done)
        elif not self._done.synchronize(min(timeout, threading.TIMEOUT_MAX)):  # the calling thread is the stream
            raise TransferTimeoutError(f"a transfer was not done after {timeout} s")


class HostExecutor(Executor):
    """Copies with ``threads`` daemon threads.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    pool
    threads
    """

    def __init__(self, fragments: Int64s, pool: Pool, threads: int) -> None:
        self._fragments, self._pool = np.ascontiguousarray(fragments), pool
        self._memcpy = memcpy_address()
        self._work: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        try:
            for at in range(threads):
                name = f"kvortex-host-copy-{at}"
                self._threads.append(threading.Thread(target=_serve, args=(self._work,), name=name, daemon=True))
                self._threads[-1].start()
        except BaseException:
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close()
            raise

    def prepare_blocks(self, direction: Direction, blocks: Int64s, slots: Int64s, stream: Any) -> HostCompletion:
        return self._prepare(copy_paged, (self._fragments,), (blocks,), slots, direction, stream)

    def prepare_buffers(
        self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any
    ) -> HostCompletion:
        return self._prepare(copy_buffers, (), (addresses, sizes), slots, direction, stream)

    def check_stream(self, stream: Any) -> None:
        check_stream(stream)

    def _prepare(
        self, copy: Any, fixed: tuple[Any, ...], rows: tuple[Int64s, ...], slots: Int64s, direction: Direction, stream: Any
    ) -> HostCompletion:
        records = self._pool.address + slots * self._pool.slot_bytes
        count = max(1, min(len(self._threads), len(slots) // _LEAST_RECORDS_A_THREAD))
        edges = np.linspace(0, len(slots), count + 1).astype(np.int64)
        to_host = direction is Direction.SAVE
        parts: list[_Part] = [
            functools.partial(copy, self._memcpy, *fixed, *(row[first:last] for row in (*rows, records)), to_host)
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]
        return HostCompletion(self._work, parts, stream)

    def close(self) -> None:
        threads, self._threads = self._threads, []
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join()


def check_stream(stream: Any) -> None:
    """Refuses what is no stream of the host device, and closed streams."""
    if stream is not None and not isinstance(stream, HostStream):
        raise ArgumentError(f"{type(stream).__name__} is no stream of the host device: pass a HostStream or None")
    if stream is not None and stream.closed:
        raise ArgumentError("this host stream was closed")


def _serve(work: queue.SimpleQueue[_Part | None]) -> None:
    while (run := work.get()) is not None:
        run()
