"""What an executor has on a GPU, and lends to each of its transfers: events, room for ids and sums, lanes, kernels."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import numpy as np

from kvortex.devices import asking
from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, TransferTimeoutError
from kvortex.kernels import build
from kvortex.memory.ids import IdBuffer, IdPool
from kvortex.transfer.cuda_completion import Events
from kvortex.transfer.digesting import Digesting, room_for
from kvortex.transfer.executor import Direction, Executor, poll
from kvortex.transfer.lane import ROW_WORDS, Job, Lane
from kvortex.transfer.plan import Int64s, Plan

_CLOSE_S = 10.0
_EVERY_PLACE = 1 << 62


class Lender(Executor):
    """The part of an executor that its transfers know.

    Parameters
    ----------
    device
    """

    def __init__(self, device: CudaDevice) -> None:
        asking.load_compiled()
        self.device = device
        self._functions = cu.functions().copy()  # which compiled code knows as an array like all others
        self._events = Events(device)
        self._guard = threading.RLock()
        self._ids: IdPool | None = None
        self._lanes: dict[Direction, Lane] = {}
        self._modules: list[Any] = []

    def _kernel(self, name: str) -> int:
        """Handle of a kernel, as long as this is open."""
        cubin = build.load(name, self.device.compute_capability)
        with cu.current(self.device.context) as driver:
            self._modules.append(cu.check(driver.cuModuleLoadData(cubin.code), f"cuModuleLoadData of {name}"))
            function = driver.cuModuleGetFunction(self._modules[-1], cubin.entry.encode())
            return int(cu.check(function, f"cuModuleGetFunction of {name}"))

    def lend(self, plan: Plan, digesting: Digesting | None) -> tuple[Int64s, IdBuffer | None]:
        """Events of a plan (start, end, one a mark), and room for what kernels read and the sums that they make, until
        :meth:`recycle`."""
        events: list[int] = []
        try:
            with self._guard:
                for _ in range(2 + len(plan.marks)):
                    events.append(self._events.take())
            ids = None
            if words := room_for(plan, digesting, ROW_WORDS).words:
                assert self._ids is not None
                ids = self._ids.take(words)
        except BaseException:
            with self._guard:
                for event in events:
                    self._events.give(event)
            raise
        return np.array(events, np.int64), ids

    def lend_event(self) -> int:
        """One more event, until :meth:`recycle`."""
        with self._guard:
            return self._events.take()

    def job(
        self,
        direction: Direction,
        plan: Plan,
        caller: int,
        after: Int64s,
        events: Int64s,
        ids: IdBuffer | None,
        digesting: Digesting | None,
        outcome: Int64s,
    ) -> Job:
        """What :meth:`submit` takes. See :meth:`kvortex.transfer.lane.Lane.job`."""
        return self._lanes[direction].job(self._functions, plan, caller, after, events, ids, digesting, outcome)

    def issue(self, direction: Direction, job: Job) -> bool:
        """Puts a plan on the streams of its direction, if nobody else puts one there just now."""
        return self._lanes[direction].issue(job)

    def leave(self, direction: Direction, job: Job) -> None:
        """Leaves that to a thread."""
        self._lanes[direction].leave(job)

    def paces(self, direction: Direction, plan: Plan) -> bool:
        """See :meth:`kvortex.transfer.lane.Lane.paces`."""
        return self._lanes[direction].paces(plan)

    def hurry_all(self) -> None:
        for lane in self._lanes.values():
            lane.hurry(_EVERY_PLACE)

    def hurry(self, direction: Direction, place: int) -> None:
        """See :meth:`kvortex.transfer.lane.Lane.hurry`."""
        self._lanes[direction].hurry(place)

    def record(self, event: int, stream: int) -> int:
        """Records an event on a caller's stream; the driver's code."""
        return self._ask(cu.EVENT_RECORD, event, stream)

    def query_event(self, event: int) -> int:
        """0 when an event has passed, else the code that says otherwise."""
        return self._ask(cu.EVENT_QUERY, event)

    def query_streams(self, direction: Direction) -> int:
        """0 when nothing of a direction runs any more, else the code that says otherwise."""
        return self.ask_streams(self._lanes[direction].every_stream)

    def ask_streams(self, streams: Int64s) -> int:
        """0 when nothing is on any of these streams, else the code that says otherwise."""
        return asking.ask_streams(self._functions, int(self.device.context), streams)

    def elapsed(self, start: int, done: int) -> float:
        """Seconds between two events that have passed; 0.0 where the driver cannot say."""
        milliseconds = np.zeros(1, np.float32)
        code = self._ask(cu.EVENT_ELAPSED, milliseconds.ctypes.data, start, done)
        return 0.0 if code else float(milliseconds[0]) * 1e-3

    def _ask(self, which: int, a: int, b: int = 0, c: int = 0) -> int:
        return asking.ask(self._functions, int(self.device.context), which, a, b, c)

    def recycle(self, events: list[int], ids: IdBuffer | None) -> None:
        """Takes back what a finished transfer used."""
        with self._guard:
            for event in events:
                self._events.give(event)
        if ids is not None and self._ids is not None:
            self._ids.give(ids)

    def _is_idle(self) -> bool:
        return all(lane.idle and self.query_streams(way) != asking.NOT_READY for way, lane in self._lanes.items())

    def close(self) -> None:
        self.hurry_all()
        # Behind the last transfer there may still be flags to write, which no transfer waits for.
        if not poll(self._is_idle, time.monotonic() + _CLOSE_S):
            raise TransferTimeoutError(f"work of a closed engine did not end within {_CLOSE_S} s")
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._events.close()
        if self._ids is not None:
            self._ids.close()
        with contextlib.suppress(DeviceError), cu.current(self.device.context) as driver:
            while self._modules:
                driver.cuModuleUnload(self._modules.pop())
