"""The executor of a GPU: gather kernel, staging buffer and DMA on several streams, issued by one compiled call."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.streams import cuda_stream_handle
from kvortex.errors import ArgumentError, DeviceError, TransferError
from kvortex.kernels import build
from kvortex.memory.ids import IdBuffer, IdPool
from kvortex.memory.staging import StagingRing
from kvortex.transfer import issue as nogil
from kvortex.transfer.executor import Completion, Direction, Executor
from kvortex.transfer.plan import Int64s, Plan, Pool, plan_direct, plan_staged, split_pieces

THREADS = 512
CTAS_PER_MULTIPROCESSOR = 0.25  # enough to feed the link from HBM many times over; the rest stays with the model
MAX_BLOCKS = 2048  # of kvortex.kernels.paged, which needs numba.cuda to import
DIRECT_BYTES = 256 << 10  # contiguous records from this size on go by DMA alone; smaller ones are gathered first


class _Events:
    """Timing events, reused."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._free: list[int] = []
        self._all: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        with cu.current(self._device.context) as driver:
            self._all.append(int(cu.check(driver.cuEventCreate(0), "cuEventCreate")))
        return self._all[-1]

    def give(self, event: int) -> None:
        self._free.append(event)

    def close(self) -> None:
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            while self._all:
                driver.cuEventDestroy(self._all.pop())
        self._free.clear()


class CudaCompletion(Completion):
    """A transfer on a GPU, between two timing events."""

    def __init__(self, executor: CudaExecutor, direction: Direction, plan: Plan, caller: int) -> None:
        self._executor, self._direction, self._plan, self._caller = executor, direction, plan, caller
        self.outcome = np.zeros(3, np.int64)
        self._lock = threading.RLock()
        self._finished = False
        self._held = executor.lend(plan)

    def start(self) -> None:
        start, done, ids = self._held
        self._executor.issue(self._direction, self._plan, self._caller, start, done, ids, self.outcome)
        self.started = True

    def cancel(self) -> None:
        if not self.outcome[nogil.ISSUED]:
            self._finish(TransferError("the call was interrupted before anything was issued"))
        self.started = True

    def query(self) -> bool:
        with self._lock:
            if self._finished:
                return True
            if not self.outcome[nogil.ISSUED]:
                return False
            start, done, _ = self._held
            # Without the events behind the work, the streams themselves must tell.
            lost = self.outcome[nogil.LAST] != 0
            code = self._executor.query_streams(self._direction) if lost else self._executor.query_event(done)
            if code and not cu.is_fatal(code):
                return False
            error: TransferError | None = None
            if code:  # with the context: nothing runs any more, and nothing that ran can be trusted
                error = TransferError(f"the GPU failed during a transfer: {cu.describe(cu.api(), code)}")
            elif self.outcome[nogil.ERROR] or lost:
                code = int(self.outcome[nogil.ERROR] or self.outcome[nogil.LAST])
                what = f"a {self._direction.value} of {self._plan.nbytes} bytes could not be issued"
                error = TransferError(f"{what}: {cu.describe(cu.api(), code)}")
            else:
                self.seconds = self._executor.elapsed(start, done)
            self._finish(error)
            return True

    def _finish(self, error: TransferError | None) -> None:
        with self._lock:
            if not self._finished:
                self.error, self._finished = error, True
                self._executor.recycle(*self._held)

    def add_to(self, stream: Any, timeout: float) -> None:
        handle = cuda_stream_handle(stream)
        with self._lock:
            if not self._finished:
                if self.outcome[nogil.LAST]:
                    raise TransferError("this transfer has no event that a stream could wait for; wait for the ticket")
                with cu.current(self._executor.device.context) as driver:
                    cu.check(driver.cuStreamWaitEvent(handle, self._held[1], 0), "cuStreamWaitEvent")


class _Lane:
    """Streams, staging buffers and a kernel of one direction. The lock keeps the plans of two threads apart."""

    def __init__(
        self, executor: CudaExecutor, direction: Direction, kernel: int, buffers: list[int], table: int, slot_bytes: int
    ) -> None:
        self.lock = threading.RLock()
        self.turn = np.zeros(1, np.int64)
        device = executor.device
        self._device = device
        self._streams: list[int] = []
        self._events: list[int] = []
        try:
            self._open(len(buffers) + 1)
        except BaseException:
            self.close()
            raise
        self.streams = np.array(self._streams[:-1], np.int64)
        self.joins = np.array(self._events[:-1], np.int64)
        self.buffers = np.array(buffers, np.int64)
        self.cells = np.zeros(nogil.LANE_CELLS, np.int64)
        self.cells[nogil.CONTEXT] = int(device.context)
        self.cells[nogil.KERNEL] = kernel
        self.cells[nogil.THREADS] = THREADS
        self.cells[nogil.MAX_CTAS] = max(1, round(device.multiprocessors * CTAS_PER_MULTIPROCESSOR))
        self.cells[nogil.TABLE] = table
        self.cells[nogil.SLOT_BYTES] = slot_bytes
        self.cells[nogil.JOIN_STREAM] = self._streams[-1]
        self.cells[nogil.CALLER_EVENT] = self._events[-1]
        self.cells[nogil.TO_HOST] = direction is Direction.SAVE
        self.parameters = np.zeros(nogil.PARAMETERS, np.int64)
        self.pointers = self.parameters.ctypes.data + 8 * np.arange(nogil.PARAMETERS, dtype=np.int64)
        self.scratch = np.zeros(1, np.int64)

    def _open(self, count: int) -> None:
        with cu.current(self._device.context) as driver:
            _, high = cu.check(driver.cuCtxGetStreamPriorityRange(), "cuCtxGetStreamPriorityRange")
            for _ in range(count):
                # Non-blocking: not ordered with the legacy default stream but through events. High priority: a gather
                # of tens of microseconds must not queue behind a model's kernels.
                flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._streams.append(int(cu.check(driver.cuStreamCreateWithPriority(flags, high), "cuStreamCreate")))
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


class CudaExecutor(Executor):
    """Moves blocks through staging buffers, or by DMA alone where a record is one long contiguous piece.

    Parameters
    ----------
    device
    fragments : (F, 4) int64
        Of the layout; (0, 4) where there is none.
    pool
        The pinned slots.
    gpu_budget
        Bytes of VRAM for staging buffers.
    streams
        Streams, and staging buffers, of each direction.
    """

    def __init__(self, device: CudaDevice, fragments: Int64s, pool: Pool, gpu_budget: int, streams: int) -> None:
        self.device = device
        self._pool, self._count = pool, streams
        self._fragments = fragments
        self._functions = cu.functions()
        self._events = _Events(device)
        self._ids = IdPool(device)
        self._guard = threading.RLock()
        self._staging: StagingRing | None = None
        self._table: Any = None
        self._module: Any = None
        self._lanes: dict[Direction, _Lane] = {}
        self._direct = len(fragments) == 1 and int(fragments[0, 3]) >= DIRECT_BYTES
        try:
            self._open(gpu_budget)
        except BaseException:
            self.close()
            raise

    def _open(self, gpu_budget: int) -> None:
        staged = len(self._fragments) > 0 and not self._direct
        kernels = {Direction.SAVE: 0, Direction.LOAD: 0}
        buffers, table = [0] * (2 * self._count), 0
        if staged:
            self._pieces = split_pieces(self._fragments)
            self._staging = StagingRing(self.device, gpu_budget, 2 * self._count)
            buffers = self._staging.addresses
            self._table = self.device.allocate(self._pieces.nbytes)
            self._table.write(self._pieces)
            table = self._table.address
            kernels = {Direction.SAVE: self._kernel("gather"), Direction.LOAD: self._kernel("scatter")}
        for at, direction in enumerate(Direction):
            mine = buffers[at * self._count : (at + 1) * self._count]
            self._lanes[direction] = _Lane(self, direction, kernels[direction], mine, table, self._pool.slot_bytes)

    def _kernel(self, name: str) -> int:
        cubin = build.load(name, self.device.compute_capability)
        with cu.current(self.device.context) as driver:
            module = cu.check(driver.cuModuleLoadData(cubin.code), f"cuModuleLoadData of {name}")
            self._module = [*(self._module or []), module]
            return int(cu.check(driver.cuModuleGetFunction(module, cubin.entry.encode()), f"cuModuleGetFunction of {name}"))

    def prepare_blocks(self, direction: Direction, blocks: Int64s, slots: Int64s, stream: Any) -> CudaCompletion:
        if self._direct:
            base, stride, _, nbytes = (int(cell) for cell in self._fragments[0])
            plan = plan_direct(base + blocks * stride, np.full(len(blocks), nbytes), slots, self._pool, self._count)
        else:
            assert self._staging is not None
            size = self._staging.buffer_bytes
            plan = plan_staged(blocks, slots, self._pieces, self._pool, size, self._count, MAX_BLOCKS)
        return CudaCompletion(self, direction, plan, cuda_stream_handle(stream))

    def prepare_buffers(
        self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any
    ) -> CudaCompletion:
        plan = plan_direct(addresses, sizes, slots, self._pool, self._count, one_tensor=False)
        return CudaCompletion(self, direction, plan, cuda_stream_handle(stream))

    def check_stream(self, stream: Any) -> None:
        handle = cuda_stream_handle(stream)
        with cu.current(self.device.context) as driver:
            code, status = driver.cuStreamIsCapturing(handle)
        if code == driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
            raise ArgumentError("the default stream cannot be waited for while another stream is being captured; pass stream=")
        cu.check((code,), "the stream of the caller")
        if status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            raise ArgumentError("the stream is being captured into a CUDA graph; a transfer cannot be part of one")

    def lend(self, plan: Plan) -> tuple[int, int, IdBuffer | None]:
        """Two events and the ids of a plan where kernels can read them, until :meth:`recycle`."""
        events: list[int] = []
        try:
            with self._guard:
                events.append(self._events.take())
                events.append(self._events.take())
            if not len(plan.ids):
                return events[0], events[1], None
            ids = self._ids.take(len(plan.ids))
        except BaseException:
            with self._guard:
                for event in events:
                    self._events.give(event)
            raise
        ids.ids[: len(plan.ids)] = plan.ids
        return events[0], events[1], ids

    def issue(
        self, direction: Direction, plan: Plan, caller: int, start: int, done: int, ids: IdBuffer | None, outcome: Int64s
    ) -> None:
        """Puts a plan on the streams of its direction; ``outcome`` tells how that went. See :func:`issue.issue`."""
        lane = self._lanes[direction]
        with lane.lock:
            nogil.issue(
                self._functions,
                lane.cells,
                lane.streams,
                lane.buffers,
                lane.joins,
                lane.turn,
                caller,
                start,
                done,
                plan.chunks,
                plan.copies,
                ids.address if ids is not None else 0,
                lane.parameters,
                lane.pointers,
                lane.scratch,
                outcome,
            )

    def query_event(self, event: int) -> int:
        """0 when an event has passed, else the code that says otherwise."""
        try:
            with cu.current(self.device.context) as driver:
                return int(driver.cuEventQuery(event)[0])
        except DeviceError as refusal:
            return refusal.code

    def query_streams(self, direction: Direction) -> int:
        """0 when nothing of a direction runs any more, else the code that says otherwise."""
        try:
            return self._lanes[direction].query()
        except DeviceError as refusal:
            return refusal.code

    def elapsed(self, start: int, done: int) -> float:
        """Seconds between two events that have passed; 0.0 where the driver cannot say."""
        with cu.current(self.device.context) as driver:
            code, milliseconds = driver.cuEventElapsedTime(start, done)
        return 0.0 if int(code) else float(milliseconds) * 1e-3

    def recycle(self, start: int, done: int, ids: IdBuffer | None) -> None:
        """Takes back what a finished transfer used."""
        with self._guard:
            self._events.give(start)
            self._events.give(done)
        if ids is not None:
            self._ids.give(ids)

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._events.close()
        self._ids.close()
        if self._staging is not None:
            self._staging.close()
        if self._table is not None:
            with contextlib.suppress(DeviceError):
                self._table.free()
        with contextlib.suppress(DeviceError), cu.current(self.device.context) as driver:
            for module in self._module or []:
                driver.cuModuleUnload(module)
        self._module = None
