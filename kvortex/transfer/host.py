"""The executor of the host device: threads that copy between RAM and RAM."""

from __future__ import annotations

import collections
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvortex.codecs import Codec
from kvortex.devices.host import HostEvent, HostStream
from kvortex.devices.native import memcpy_address
from kvortex.digests.host import add_lengths, numbers
from kvortex.digests.keys import Numbers as Sums
from kvortex.errors import ArgumentError, TransferError, TransferTimeoutError
from kvortex.transfer.coding import Coder
from kvortex.transfer.copies import copy_buffers, copy_paged, load_compiled
from kvortex.transfer.executor import Completion, Direction, Executor, Mark, Part
from kvortex.transfer.layers import Least, cut_layers, cut_sections, group_count, group_layers
from kvortex.transfer.layerwise import LayerSave
from kvortex.transfer.plan import Int64s, Pool

_LEAST_RECORDS_A_THREAD = 4
_LONGEST_END_S = 60.0  # of a thread that has nothing left to do
_Part: TypeAlias = Callable[[], None]

# Of a group of layers, in one record and in all: below, handing it to a thread outweighs copying it.
LEAST = Least(1, 256 << 10, 2 << 20)


class HostMark(Mark):
    """An event of a host stream; None where the calling thread was the stream, and has done what it did."""

    def __init__(self, event: HostEvent | None) -> None:
        self.event = event

    def busy(self) -> bool:
        return self.event is not None and not self.event.query()


class HostCompletion(Part):
    """A transfer in parts that several threads work on; done when the last one is.

    Parameters
    ----------
    work
        Queue of the threads.
    groups
        What is to be done: the parts of each group of layers, the first ones first.
    group_of
        Group of each layer.
    stream
        To be started behind, or None.
    sums : (g, n, 2) uint64, or None
        What the parts of each group digest.
    sizes : (n,) int64, or None
        Bytes of the records; None where they are only a part of them.
    good : (n,) bool, or None
        Where a codec's parts say which records they could code or decode.
    """

    route = "host"

    def __init__(
        self,
        work: queue.SimpleQueue[_Part | None],
        groups: Sequence[Sequence[_Part]],
        group_of: Sequence[int],
        stream: HostStream | HostMark | None,
        sums: Sums | None = None,
        sizes: Int64s | None = None,
        good: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self._sums, self._sizes, self._good = sums, sizes, good
        self._work, self._group_of, self._stream = work, group_of, stream
        self._before: collections.deque[HostEvent] = collections.deque()
        self._parts = [(at, part) for at, parts in enumerate(groups) for part in parts][::-1]
        self._left = [len(parts) for parts in groups]
        self._lock = threading.RLock()
        self._groups_done = [HostEvent() for _ in groups]
        self._done = HostEvent()
        self._began: float | None = None

    def start(self) -> None:
        stream, self._stream = self._stream, None
        self.follow(stream)
        self._enqueue()
        self.started = True

    def follow(self, stream: Any) -> None:
        if isinstance(stream, HostMark):
            if stream.event is not None:
                self._before.append(stream.event)
        elif stream is not None:  # else the calling thread is the stream, and has done what it did
            self._before.append(stream.record())

    def _enqueue(self) -> None:
        while self._before:
            event = self._before[0]
            if not event.query():
                event.when_set(self._enqueue)  # no thread waits, so transfers cannot block each other
                return
            self._before.popleft()
            if event.error is not None:
                self._drop(TransferError(f"the work that it waited for raised {event.error!r}"))
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
            group, part = self._parts.pop()  # atomic: each part goes to one thread
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
            self._left[group] -= 1
            self.error = self.error or error
            group_is_done, last = self._left[group] == 0, not any(self._left)
            self.seconds = time.perf_counter() - self._began
            if last and self._sums is not None:
                self.sums = np.add.reduce(self._sums)
                self.digests = None if self._sizes is None else add_lengths(self.sums, self._sizes)
            if last and self._good is not None and not self._good.all():
                self.unfit = ~self._good
        if group_is_done:
            self._groups_done[group].set()
        if last:
            self._done.set()

    def query(self) -> bool:
        return self._done.query()

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        check_stream(stream)
        event = self._done if layer is None or not self._group_of else self._groups_done[self._group_of[layer]]
        if stream is not None:
            stream.wait(event)
        elif not event.synchronize(min(timeout, threading.TIMEOUT_MAX)):  # the calling thread is the stream
            raise TransferTimeoutError(f"a transfer was not done after {timeout} s")


class HostExecutor(Executor):
    """Copies with ``threads`` daemon threads.

    Parameters
    ----------
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    layer_offsets : (L + 1,) int64
        Of the layout; (1,) where there is none.
    pool
    threads
    digests
        Whether blocks are digested while they are copied.
    codec
        Whose records slots hold, of blocks of the layout; None for the blocks themselves.
    """

    def __init__(
        self,
        fragments: Int64s,
        layer_offsets: Int64s,
        pool: Pool,
        threads: int,
        digests: bool = False,
        codec: Codec | None = None,
    ) -> None:
        self._digests, self._numbers = digests, numbers(pool.slot_bytes)
        self._coder = None if codec is None else Coder(codec)
        self._fragments, self._layer_offsets, self._pool = np.ascontiguousarray(fragments), layer_offsets, pool
        self._memcpy = memcpy_address()
        load_compiled()
        if self._coder is not None:
            self._coder.load_compiled(self._fragments)
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

    def prepare_blocks(
        self,
        direction: Direction,
        blocks: Int64s,
        slots: Int64s,
        stream: Any,
        layerwise: bool = False,
        parts: Int64s | None = None,
    ) -> Completion:
        if self._coder is not None:
            return self._prepare_coded(self._coder, direction, blocks, slots, stream, layerwise, parts)
        sizes = np.full(len(blocks), self._layer_offsets[-1])
        if not layerwise:
            sums = self._zeros(1, len(blocks))
            mine = self._parts(copy_paged, (self._fragments,), (blocks,), slots, direction, sums, 0)
            return HostCompletion(self._work, [mine], (), stream, sums, sizes)
        fragments = cut_layers(self._fragments, self._layer_offsets)
        num_layers, record_bytes = len(self._layer_offsets) - 1, int(self._layer_offsets[-1])
        count = group_count(num_layers, record_bytes, len(blocks), len(blocks), LEAST)
        sections = cut_sections(fragments, self._layer_offsets, group_layers(self._layer_offsets, count), None)
        edges = sections.first_pieces.tolist()
        sums = self._zeros(len(edges) - 1, len(blocks))
        groups = [
            self._parts(copy_paged, (fragments[first:last],), (blocks,), slots, direction, sums, at)
            for at, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        ]
        if direction is Direction.SAVE:
            each = [sums if sums is None else sums[at : at + 1] for at in range(len(groups))]
            saves = [HostCompletion(self._work, [parts], (), None, mine) for parts, mine in zip(groups, each, strict=True)]
            return LayerSave(saves, sections.group_of, sizes)
        return HostCompletion(self._work, groups, sections.group_of.tolist(), stream, sums, sizes)

    def _prepare_coded(
        self,
        coder: Coder,
        direction: Direction,
        blocks: Int64s,
        slots: Int64s,
        stream: Any,
        layerwise: bool,
        parts: Int64s | None,
    ) -> Completion:
        """Through a codec, which takes whole records: all layers are one group."""
        sums, sizes = self._zeros(1, len(blocks)), np.full(len(blocks), coder.codec.slot_bytes)
        good = np.ones(len(blocks), np.bool_)
        function, fixed, rows = coder.call(self._fragments, blocks, parts, good)
        mine = self._parts(function, fixed, rows, slots, direction, sums, 0, least=1)
        in_groups = layerwise and direction is Direction.SAVE
        made = HostCompletion(self._work, [mine], (), None if in_groups else stream, sums, sizes, good)
        return LayerSave([made], np.zeros(len(self._layer_offsets) - 1, np.int64), sizes) if in_groups else made

    def prepare_buffers(
        self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any
    ) -> HostCompletion:
        sums = self._zeros(1, len(sizes))
        parts = self._parts(copy_buffers, (), (addresses, sizes), slots, direction, sums, 0)
        return HostCompletion(self._work, [parts], (), stream, sums, sizes)

    def _zeros(self, groups: int, count: int) -> Sums | None:
        """Sums of each group apart, since threads may work on several of one record at a time."""
        return np.zeros((groups, count, 2), np.uint64) if self._digests else None

    def mark(self, stream: Any) -> HostMark:
        return HostMark(None if stream is None else stream.record())

    def check_stream(self, stream: Any) -> None:
        check_stream(stream)

    def _parts(
        self,
        copy: Any,
        fixed: tuple[Any, ...],
        rows: tuple[npt.NDArray[Any], ...],
        slots: Int64s,
        direction: Direction,
        sums: Sums | None,
        group: int,
        least: int = _LEAST_RECORDS_A_THREAD,
    ) -> list[_Part]:
        mine = np.empty((0, 2), np.uint64) if sums is None else sums[group]
        records = self._pool.address + slots * self._pool.slot_bytes
        count = max(1, min(len(self._threads), len(slots) // least))
        edges = np.linspace(0, len(slots), count + 1).astype(np.int64)
        to_host = direction is Direction.SAVE
        return [
            functools.partial(
                copy, self._memcpy, *fixed, *(row[first:last] for row in (*rows, records, mine)), to_host, self._numbers
            )
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]

    def close(self) -> None:
        threads, self._threads = self._threads, []
        for _ in threads:
            self._work.put(None)
        deadline = time.monotonic() + _LONGEST_END_S
        for thread in threads:
            if thread is not threading.current_thread():  # the collector may bring us here in a thread that copies
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    raise TransferTimeoutError(f"{thread.name} still copies after {_LONGEST_END_S} s: its memory stays")


def check_stream(stream: Any) -> None:
    """Refuses what is no stream of the host device, and closed streams."""
    if stream is not None and not isinstance(stream, HostStream):
        raise ArgumentError(f"{type(stream).__name__} is no stream of the host device: pass a HostStream or None")
    if stream is not None and stream.closed:
        raise ArgumentError("this host stream was closed")


def _serve(work: queue.SimpleQueue[_Part | None]) -> None:
    while (run := work.get()) is not None:
        run()
