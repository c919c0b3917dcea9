"""One transfer on a GPU, and the events that tell how it goes."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.streams import cuda_stream_handle
from kvortex.digests.host import add_lengths
from kvortex.errors import DeviceError, TransferError, TransferTimeoutError
from kvortex.transfer.digesting import Digesting, room_for, status_of, sums_of
from kvortex.transfer.executor import Direction, Mark, Part, poll
from kvortex.transfer.issue import cells
from kvortex.transfer.lane import ROW_WORDS, Job, is_short
from kvortex.transfer.plan import Int64s, Plan
from kvortex.transfer.routes import Route

if TYPE_CHECKING:
    from kvortex.transfer.cuda import CudaExecutor


class Events:
    """Timing events, reused."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._free: list[int] = []
        self._all: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        with cu.current(self._device.context) as driver:
            self._all.append(event := int(cu.check(driver.cuEventCreate(0), "cuEventCreate")))
        return event

    def give(self, event: int) -> None:
        self._free.append(event)

    def close(self) -> None:
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            while self._all:
                driver.cuEventDestroy(self._all.pop())
        self._free.clear()


class CudaMark(Mark):
    """An event behind what was on a stream. Goes back to its executor unused, or with the transfer that waited for it."""

    def __init__(self, executor: CudaExecutor, stream: int) -> None:
        self._executor = executor
        self._event: int | None = executor.lend_event()
        if code := executor.record(self._event, stream):
            raise DeviceError(f"cuEventRecord on the stream of a load: {cu.describe(cu.api(), code)}")

    def busy(self) -> bool:
        return self._event is not None and bool(self._executor.query_event(self._event))

    def take(self) -> int:
        """The event, for good."""
        event, self._event = self._event, None
        assert event is not None
        return event

    def __del__(self) -> None:
        event = getattr(self, "_event", None)
        if event is not None:
            self._executor.recycle([event], None)


class CudaCompletion(Part):
    """A transfer on a GPU, between two timing events.

    Parameters
    ----------
    executor, direction, plan, route
    caller
        Stream to be started behind; ``NO_STREAM`` for those of :meth:`follow`.
    group_of : (L,) int64
        Of a layer-wise load: the mark of each layer.
    digesting, sizes
        What is digested, or None; and bytes of the records, (n,) int64, unless it is only a part of them.
    mark
        In the place of a stream to be started behind.
    behind
        Never issued before that transfer of the same direction, which was started.
    beside_compute
        Whether a model computes meanwhile.
    """

    def __init__(
        self,
        executor: CudaExecutor,
        direction: Direction,
        plan: Plan,
        caller: int,
        route: Route,
        group_of: Int64s | None = None,
        digesting: Digesting | None = None,
        sizes: Int64s | None = None,
        mark: CudaMark | None = None,
        behind: CudaCompletion | None = None,
        beside_compute: bool = False,
    ) -> None:
        self.route, self._group_of = route.value, group_of
        self._executor, self._direction, self._plan, self._caller = executor, direction, plan, caller
        self.outcome = np.zeros(cells.OUTCOME_CELLS, np.int64)
        self._job: Job | None = None
        self._lock = threading.RLock()
        self._finished = False
        self._behind = behind
        self.outcome[cells.PACED] = beside_compute and executor.paces(direction, plan)
        self._followed: list[int] = []  # events, recorded
        self._digesting, self._sizes = digesting, sizes
        self._events, self._ids = executor.lend(plan, digesting)
        if mark is not None:
            self._followed.append(mark.take())

    def start(self) -> None:
        left = self._behind is not None and self._behind.outcome[cells.QUEUED]  # and may not be issued yet
        here = is_short(self._plan) and not left and not self.outcome[cells.PACED]
        if not here or not self._executor.issue(self._direction, self._made(self._caller)):
            self._leave()
        self.started = True

    def _leave(self) -> None:
        """To the lane's thread."""
        if self._caller != cells.NO_STREAM:  # what is on it now counts, and not when another thread issues the plan
            self._followed.append(self._executor.lend_event())
            if code := self._executor.record(self._followed[-1], self._caller):
                self.outcome[cells.ERROR], self.outcome[cells.ISSUED] = code, 1
                return
        self._job = self._made(cells.NO_STREAM)  # kept, since that thread will read its arrays
        self._executor.leave(self._direction, self._job)

    def _made(self, caller: int) -> Job:
        after = np.array(self._followed, np.int64)
        lent = self._events, self._ids, self._digesting
        return self._executor.job(self._direction, self._plan, caller, after, *lent, self.outcome)

    def follow(self, stream: Any) -> None:
        handle = cuda_stream_handle(stream)
        with self._lock:
            if self._finished:  # and what it had lent is others' by now
                return
            # One each time: a handle may mean another stream by now, and that of the thread's own stream always may.
            self._followed.append(self._executor.lend_event())
            with cu.current(self._executor.device.context) as driver:
                cu.check(driver.cuEventRecord(self._followed[-1], handle), "cuEventRecord on the stream of a layer")

    def cancel(self) -> None:
        if not self.outcome[cells.ISSUED] and not self.outcome[cells.QUEUED]:
            self._finish(TransferError("the call was interrupted before anything was issued"))
        self.started = True

    def query(self) -> bool:
        with self._lock:
            if self._finished:
                return True
            if not self.outcome[cells.ISSUED]:
                return False
            start, done = self._events[:2].tolist()
            # Without the events behind the work, the streams themselves must tell.
            lost = self.outcome[cells.LAST] != 0
            code = self._executor.query_streams(self._direction) if lost else self._executor.query_event(done)
            if code and not cu.is_fatal(code):
                return False
            error: TransferError | None = None
            if code:  # with the context: nothing runs any more, and nothing that ran can be trusted
                error = TransferError(f"the GPU failed during a transfer: {cu.describe(cu.api(), code)}")
            elif self.outcome[cells.ERROR] or lost:
                code = int(self.outcome[cells.ERROR] or self.outcome[cells.LAST])
                what = f"a {self._direction.value} of {self._plan.nbytes} bytes could not be issued"
                error = TransferError(f"{what}: {cu.describe(cu.api(), code)}")
            else:
                self.seconds = self._executor.elapsed(start, done)
                self._take_digests()
            self._finish(error)
            return True

    def _take_digests(self) -> None:
        """Before the memory that they lie in is others'."""
        if self._digesting is not None and self._ids is not None:
            room = room_for(self._plan, self._digesting, ROW_WORDS)
            if self._digesting.coded:
                unfit = status_of(self._ids.ids, room, self._plan) != 0
                self.unfit = unfit if unfit.any() else None
            if self._digesting.summed:
                self.sums = sums = sums_of(self._ids.ids, room, self._plan, self._digesting)
                self.digests = None if self._sizes is None else add_lengths(sums, self._sizes)

    @property
    def issued(self) -> bool:
        """Whether there is nothing left to be put on the GPU."""
        return self._finished or bool(self.outcome[cells.ISSUED])

    def _is_issued(self) -> bool:
        """To be asked by who wants it to be: hurries the thread that it is left to."""
        if not self.issued:
            self._executor.hurry(self._direction, int(self.outcome[cells.QUEUED]))
        return self.issued

    def _finish(self, error: TransferError | None) -> None:
        with self._lock:
            if not self._finished:
                self.error, self._finished = error, True
                self._executor.recycle([*self._events.tolist(), *self._followed], self._ids)

    def add_to(self, stream: Any, timeout: float, layer: int | None = None) -> None:
        handle = cuda_stream_handle(stream)
        if not poll(self._is_issued, time.monotonic() + timeout):
            raise TransferTimeoutError(f"a {self._direction.value} was not issued after {timeout} s")
        # After an error layers may have no event of their own; the last one stands for all then.
        at = 1
        if layer is not None and self._group_of is not None and not self.outcome[cells.ERROR]:
            at = 2 + int(self._group_of[layer])
        with self._lock:
            if not self._finished:
                if self.outcome[cells.LAST]:
                    raise TransferError("this transfer has no event that a stream could wait for; wait for the ticket")
                with cu.current(self._executor.device.context) as driver:
                    cu.check(driver.cuStreamWaitEvent(handle, int(self._events[at]), 0), "cuStreamWaitEvent")
