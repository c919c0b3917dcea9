"""A GPU made of RAM that does its work later, in any order that streams, events and flags allow.

Each stream has a queue. Whoever asks how far the GPU is (a query of an event, a synchronization) lets some streams go some
steps, chosen at random. Kernels and copies take several steps, between which others run, and read what is in memory then:
also block ids, and whatever else must not be reused too early. A driver that reads its arguments during the call, as that
of batches, gets them at the call.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests import fake_codecs
from tests.fake_driver import Result
from tests.fake_gpu import _CODES, _DIGESTS, _ENTRIES, _RESIDENT, FakeGpu, ids_of, is_behind
from tests.transfer.recorder import Call

_WAITING = "waiting"


class Point:
    """What an event stands for since it was recorded last."""

    def __init__(self) -> None:
        self.passed = False


class LateGpu(FakeGpu):
    """
    Attributes
    ----------
    patience
        Most steps at a time; 0 stops everything.
    """

    lazy = True

    def __init__(self, seed: int, patience: int = 12) -> None:
        super().__init__()
        self.patience = patience
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._streams: dict[int, deque[Iterator[str]]] = defaultdict(deque)
        self._points: dict[int, Point] = {}
        self.answers |= {
            "cuEventRecord": lambda event, stream: self._now(self._record, int(event), int(stream)),
            "cuStreamWaitEvent": lambda stream, event, _: self._now(self._wait, int(stream), int(event)),
            "cuEventQuery": lambda event: (Result(0 if self._passed(int(event)) else 600),),
            "cuStreamQuery": lambda stream: (Result(0 if self._idle(int(stream)) else 600),),
            "cuCtxSynchronize": lambda: self._now(self.finish),
            "cuStreamSynchronize": lambda _: self._now(self.finish),
        }

    def enqueue(self, stream: int, work: Callable[..., object], *arguments: Any) -> None:
        """Something of a caller's, on a stream of a caller's."""

        def run() -> Iterator[str]:
            work(*arguments)
            yield "done"

        self._put(stream, run())

    def finish(self) -> None:
        """Everything that can be done."""
        with self._lock:
            while self._step():
                pass

    @property
    def left(self) -> int:
        """Entries of all queues."""
        return sum(map(len, self._streams.values()))

    def _now(self, action: Callable[..., object], *arguments: int) -> tuple[Result]:
        action(*arguments)
        return (Result(0),)

    def _put(self, stream: int, work: Iterator[str]) -> None:
        with self._lock:
            self._streams[stream].append(work)

    def _step(self) -> bool:
        """Lets one stream that can go on do so; whether there was one."""
        busy = [queue for queue in self._streams.values() if queue]
        while busy:
            at = int(self._random.random() * len(busy))
            queue, busy[at] = busy[at], busy[-1]
            busy.pop()
            state = next(queue[0], "end")
            if state == "end":
                queue.popleft()
            if state != _WAITING:
                return True
        return False

    def _advance(self) -> None:
        with self._lock:
            for _ in range(self._random.randint(0, self.patience)):
                if not self._step():
                    return

    def _passed(self, event: int) -> bool:
        self._advance()
        return event not in self._points or self._points[event].passed

    def _idle(self, stream: int) -> bool:
        self._advance()
        return not self._streams[stream]

    def _record(self, event: int, stream: int) -> None:
        point = self._points[event] = Point()

        def reach() -> Iterator[str]:
            point.passed = True
            yield "reached"

        self._put(stream, reach())

    def _wait(self, stream: int, event: int) -> None:
        point = self._points.get(event)

        def hold() -> Iterator[str]:
            while point is not None and not point.passed:
                yield _WAITING

        self._put(stream, hold())

    def _execute(self, call: Call) -> None:
        if call.name == "record":
            self._record(*call.arguments[:2])
        elif call.name == "wait":
            self._wait(*call.arguments[:2])
        elif call.name not in ("push", "pop"):
            self._put(call.stream, self._work(call))

    def _work(self, call: Call) -> Iterator[str]:
        name = call.name
        if name == "wait_value":
            while is_behind(*call.arguments[1:3]):
                yield _WAITING
        elif name == "write_value":
            assert call.arguments[1] not in self.counters, "a flag where launches share work"
            cell = ctypes.c_uint32.from_address(call.arguments[1])
            if (call.arguments[2] - cell.value) & 0x80000000:
                self.wild.append(f"a flag goes back from {cell.value} to {call.arguments[2]}")
            cell.value = call.arguments[2] & 0xFFFFFFFF
            yield "written"
        elif name == "launch" and call.arguments[0] in _RESIDENT:
            yield from self._serve(call)
        elif name == "launch" and call.arguments[0] in _CODES:
            yield from fake_codecs.code(self, call)
        elif name == "launch" and call.arguments[0] in (_ENTRIES[b"read_pages"], _ENTRIES[b"read_buffers"]):
            while self.awaits(call):
                yield _WAITING
            self._read(call)
            yield "read"
        elif name == "launch":
            yield from self._gather(call)
        elif name == "lines":
            source, from_pitch, target, to_pitch = self._rectangle(call.parameters)
            for line in range(call.parameters[15]):
                yield from self._by_halves(target + line * to_pitch, source + line * from_pitch, call.parameters[14])
        elif name in ("batch", "batch_12"):
            count = call.arguments[3]
            for copy in zip(*np.reshape(call.parameters[: 3 * count], (3, count)).tolist(), strict=True):
                yield from self._by_halves(*copy)
        else:
            yield from self._by_halves(*call.arguments[:3])

    def _by_halves(self, target: int, source: int, nbytes: int) -> Iterator[str]:
        half = nbytes // 2
        self._copy("a copy", target, source, half)
        yield "half"
        self._copy("a copy", target + half, source + half, nbytes - half)
        yield "whole"

    def _gather(self, call: Call) -> Iterator[str]:
        staging, table, n_pieces, ids, n_blocks, pitch, only, counter, numbers_at, sums, record, piece = call.parameters
        self.check_counter(counter, call.stream)
        entry = call.arguments[0]
        pieces: Any = np.ctypeslib.as_array((ctypes.c_int64 * (4 * n_pieces)).from_address(table)).reshape(-1, 4).tolist()
        for b, block in enumerate(ids_of(ids, n_blocks, only)):
            for p, (base, stride, offset, nbytes) in enumerate(pieces):
                pair = staging + b * pitch + offset - pieces[0][2], base + block * stride
                self._copy("a kernel", *(pair if entry & 0xFF == _ENTRIES[b"gather"] else pair[::-1]), nbytes)
                if entry & _DIGESTS:
                    self.digest(pair[1], nbytes, offset, numbers_at, sums + b * record + p * piece, piece)
            yield "moved"
