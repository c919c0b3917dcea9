"""The executor of the host device: threads that copy between RAM and RAM."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kvortex.devices.host import HostEvent, HostStream
from kvortex.devices.native import memcpy_address
from kvortex.errors import ArgumentError, TransferError
from kvortex.transfer.copies import copy_buffers, copy_paged
from kvortex.transfer.executor import Completion, Direction, Executor
from kvortex.transfer.plan import Int64s, Pool

_LEAST_RECORDS_A_THREAD = 4


class HostCompletion(Completion):
    """A transfer that several threads work on; done when the last one is."""

    def __init__(self, parts: int) -> None:
        self._left = parts
        self._lock = threading.Lock()
        self._done = HostEvent()
        self._began: float | None = None

    def query(self) -> bool:
        return self._done.query()

    def add_to(self, stream: Any) -> None:
        if isinstance(stream, HostStream):
            stream.wait(self._done)
        elif stream is None:
            self._done.synchronize()  # the calling thread is the stream that None stands for
        else:
            raise ArgumentError(f"{type(stream).__name__} is no stream of the host device: pass a HostStream or None")

    def began(self) -> None:
        """One part starts."""
        with self._lock:
            if self._began is None:
                self._began = time.perf_counter()

    def ended(self, error: TransferError | None) -> None:
        """One part ends."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if self._left == 0:
                self.seconds = time.perf_counter() - (self._began or 0.0)
                self._done.set()


class HostExecutor(Executor):
    """Copies with ``threads`` threads.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    pool
    threads
    """

    def __init__(self, fragments: Int64s, pool: Pool, threads: int) -> None:
        self._fragments, self._pool, self._threads = np.ascontiguousarray(fragments), pool, threads
        self._memcpy = memcpy_address()
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="kvortex-host-copy")

    def submit_blocks(self, direction: Direction, blocks: Int64s, slots: Int64s, stream: Any) -> Completion:
        return self._submit(copy_paged, (self._fragments,), (blocks,), slots, direction, stream)

    def submit_buffers(self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any) -> Completion:
        return self._submit(copy_buffers, (), (addresses, sizes), slots, direction, stream)

    def check_stream(self, stream: Any) -> None:
        if stream is not None and not isinstance(stream, HostStream):
            raise ArgumentError(f"{type(stream).__name__} is no stream of the host device: pass a HostStream or None")

    def _submit(
        self, copy: Any, fixed: tuple[Any, ...], rows: tuple[Int64s, ...], slots: Int64s, direction: Direction, stream: Any
    ) -> Completion:
        self.check_stream(stream)
        records = self._pool.address + slots * self._pool.slot_bytes
        parts = max(1, min(self._threads, len(slots) // _LEAST_RECORDS_A_THREAD))
        edges = np.linspace(0, len(slots), parts + 1).astype(np.int64)
        cuts = [tuple(row[first:last] for row in (*rows, records)) for first, last in zip(edges[:-1], edges[1:], strict=True)]
        completion = HostCompletion(parts)
        to_host = direction is Direction.SAVE

        def start() -> None:
            for cut in cuts:
                self._workers.submit(_run, completion, copy, (self._memcpy, *fixed, *cut, to_host))

        if stream is None:
            start()
        else:
            stream.record().when_set(start)  # no thread waits, so transfers cannot block each other
        return completion

    def close(self) -> None:
        self._workers.shutdown(wait=True)


def _run(completion: HostCompletion, copy: Any, arguments: tuple[Any, ...]) -> None:
    error: TransferError | None = None
    completion.began()
    try:
        copy(*arguments)
    except Exception as failure:  # the waiter must hear of whatever went wrong in this thread
        error = TransferError(f"a host copy failed: {failure}")
    completion.ended(error)
