"""What one direction of an executor has on the GPU: streams, staging buffers, events, and the numbers of its launches."""

from __future__ import annotations

import contextlib
import threading

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError
from kvortex.memory.ids import IdBuffer
from kvortex.transfer import issue as nogil
from kvortex.transfer import resident
from kvortex.transfer.executor import Direction
from kvortex.transfer.plan import Int64s, Plan

THREADS = 512
CTAS_PER_MULTIPROCESSOR = 0.25  # the rest stays with the model
ROW_WORDS = 2 * resident.ROW_CELLS  # of an IdBuffer's int32
RESIDENT_THREADS = 512  # of kvortex.kernels.resident, which needs numba.cuda to import


class Lane:
    """Streams, staging buffers and kernels of one direction. The lock keeps the plans of two threads apart.

    Parameters
    ----------
    device
    direction
    kernel, resident_kernel
        Handles; 0 where no plan has kernels.
    count
        Streams that launches and copies are dealt to.
    buffers
        Addresses of staging buffers, at least as many as streams.
    flags
        Address of ``2 * resident.FLAG_BYTES`` bytes of VRAM for each buffer, zeroed.
    table, offsets
        Address of the pieces in VRAM, and their record offsets.
    """

    def __init__(
        self,
        device: CudaDevice,
        direction: Direction,
        kernel: int,
        resident_kernel: int,
        count: int,
        buffers: list[int],
        flags: int,
        table: int,
        offsets: Int64s,
    ) -> None:
        self.lock = threading.RLock()
        self._device = device
        self._streams: list[int] = []
        self._events: list[int] = []
        try:
            self._open(count + 2, behind=direction is Direction.SAVE)
        except BaseException:
            self.close()
            raise
        *streams, kernel_stream, join_stream = self._streams
        *joins, kernel_event, caller_event = self._events
        self.streams, self.joins = np.array(streams, np.int64), np.array(joins, np.int64)
        self.buffers, self.offsets = np.array(buffers, np.int64), np.ascontiguousarray(offsets)
        self.cells = np.zeros(nogil.LANE_CELLS, np.int64)
        self.cells[nogil.CONTEXT] = int(device.context)
        self.cells[nogil.KERNEL] = kernel
        self.cells[nogil.THREADS] = THREADS
        self.cells[nogil.MAX_CTAS] = max(1, round(device.multiprocessors * CTAS_PER_MULTIPROCESSOR))
        self.cells[nogil.TABLE] = table
        self.cells[nogil.JOIN_STREAM] = join_stream
        self.cells[nogil.CALLER_EVENT] = caller_event
        self.cells[nogil.TO_HOST] = direction is Direction.SAVE
        self._ring = np.array([kernel_stream, kernel_event, resident_kernel, 0, flags], np.int64)
        self._filled = np.zeros((2, len(buffers)), np.int64)
        self._turn, self._resident_turn = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._parameters = np.zeros(max(nogil.PARAMETERS, resident.PARAMETERS), np.int64)
        self._pointers = self._parameters.ctypes.data + 8 * np.arange(len(self._parameters), dtype=np.int64)
        self._scratch = np.zeros(nogil.SCRATCH_CELLS, np.int64)

    def issue(
        self, functions: Int64s, plan: Plan, caller: int, events: Int64s, ids: IdBuffer | None, outcome: Int64s
    ) -> None:
        """Puts a plan on the GPU; ``outcome`` tells how that went.

        ``events`` are recorded before, after, and at each mark. See :func:`kvortex.transfer.issue.issue`.
        """
        with self.lock:
            if plan.ctas:
                self._issue_resident(functions, plan, caller, events, ids, outcome)
                return
            address = ids.address if ids is not None else 0
            if ids is not None:
                ids.ids[: len(plan.ids)] = plan.ids
            nogil.issue(
                functions,
                self.cells,
                self.streams,
                self.buffers,
                self.joins,
                self._turn,
                caller,
                events[0],
                events[1],
                plan.chunks,
                plan.copies,
                plan.pitch,
                plan.marks,
                events[2:],
                address,
                self._parameters,
                self._pointers,
                self._scratch,
                outcome,
            )

    def _issue_resident(
        self, functions: Int64s, plan: Plan, caller: int, events: Int64s, ids: IdBuffer | None, outcome: Int64s
    ) -> None:
        assert ids is not None
        words = ROW_WORDS * len(plan.chunks)
        ids.ids[words : words + len(plan.ids)] = plan.ids
        rows = ids.ids[:words].view(np.int64).reshape(-1, resident.ROW_CELLS)
        self._ring[resident.THREADS] = plan.ctas * RESIDENT_THREADS
        resident.issue_resident(
            functions,
            self.cells,
            self._ring,
            plan.ctas,
            self.streams,
            self.buffers,
            self.joins,
            self._resident_turn,
            self._filled,
            self.offsets,
            caller,
            events[0],
            events[1],
            plan.chunks,
            plan.copies,
            plan.pitch,
            plan.marks,
            events[2:],
            rows,
            np.array([ids.address, ids.mirror, 4 * (words + len(plan.ids))], np.int64),
            self._parameters,
            self._pointers,
            self._scratch,
            outcome,
        )

    def _open(self, count: int, *, behind: bool) -> None:
        with cu.current(self._device.context) as driver:
            low, high = cu.check(driver.cuCtxGetStreamPriorityRange(), "cuCtxGetStreamPriorityRange")
            # High priority: a short gather must not queue behind a model's kernels. Loads before saves,
            # since a model waits for them. (A smaller number is a higher priority.)
            priority = min(high + 1, low) if behind else high
            for _ in range(count):
                # Non-blocking: not ordered with the legacy default stream but through events.
                flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._streams.append(int(cu.check(driver.cuStreamCreateWithPriority(flags, priority), "cuStreamCreate")))
                no_timing = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
                self._events.append(int(cu.check(driver.cuEventCreate(no_timing), "cuEventCreate")))

    def query(self) -> int:
        """0 when no stream has work left, else the first code that says otherwise."""
        with cu.current(self._device.context) as driver:
            return next((code for s in self._streams if (code := int(driver.cuStreamQuery(s)[0]))), 0)

    def close(self) -> None:
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            while self._events:
                driver.cuEventDestroy(self._events.pop())
            while self._streams:
                driver.cuStreamDestroy(self._streams.pop())
