"""The executor of a GPU: gather kernel, staging buffer and DMA on several streams, issued by one compiled call."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.devices.streams import cuda_stream_handle
from kvortex.errors import DeviceError, TransferError
from kvortex.kernels import build
from kvortex.memory.ids import IdBuffer, IdPool
from kvortex.memory.staging import StagingRing
from kvortex.transfer import issue as nogil
from kvortex.transfer.executor import Completion, Direction, Executor, Failed
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

    def __init__(
        self, executor: CudaExecutor, start: int, done: int, ids: IdBuffer | None, error: TransferError | None
    ) -> None:
        self._executor = executor
        self._start, self._done, self._ids = start, done, ids
        self._lock = threading.Lock()
        self._finished = False
        self._failure = error

    def query(self) -> bool:
        with self._lock:
            if not self._finished:
                try:
                    with cu.current(self._executor.device.context) as driver:
                        (code,) = driver.cuEventQuery(self._done)
                        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
                            return False
                        cu.check((code,), "the GPU failed during a transfer")
                        if not self._failure:
                            code, milliseconds = driver.cuEventElapsedTime(self._start, self._done)
                            self.seconds = 0.0 if int(code) else float(milliseconds) * 1e-3
                except DeviceError as lost:  # with the context: nothing runs any more, and nothing that ran can be trusted
                    self._failure = self._failure or TransferError(str(lost))
                self.error = self._failure
                self._finished = True
                self._executor.recycle(self._start, self._done, self._ids)
            return True

    def add_to(self, stream: Any) -> None:
        handle = cuda_stream_handle(stream)
        with self._lock:
            if not self._finished:
                with cu.current(self._executor.device.context) as driver:
                    cu.check(driver.cuStreamWaitEvent(handle, self._done, 0), "cuStreamWaitEvent")


class _Lane:
    """Streams, staging buffers and a kernel of one direction. The lock keeps the plans of two threads apart."""

    def __init__(
        self, executor: CudaExecutor, direction: Direction, kernel: int, buffers: list[int], table: int, slot_bytes: int
    ) -> None:
        self.lock = threading.Lock()
        self.turn = 0
        device = executor.device
        self._device = device
        self._streams: list[int] = []
        self._events: list[int] = []
        try:
            self._open(len(buffers) + 1)
        except DeviceError:
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
        self._guard = threading.Lock()
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

    def submit_blocks(self, direction: Direction, blocks: Int64s, slots: Int64s, stream: Any) -> Completion:
        if self._direct:
            base, stride, _, nbytes = (int(cell) for cell in self._fragments[0])
            plan = plan_direct(base + blocks * stride, np.full(len(blocks), nbytes), slots, self._pool, self._count)
        else:
            assert self._staging is not None
            size = self._staging.buffer_bytes
            plan = plan_staged(blocks, slots, self._pieces, self._pool, size, self._count, MAX_BLOCKS)
        return self._submit(direction, plan, stream)

    def submit_buffers(self, direction: Direction, addresses: Int64s, sizes: Int64s, slots: Int64s, stream: Any) -> Completion:
        return self._submit(direction, plan_direct(addresses, sizes, slots, self._pool, self._count, one_tensor=False), stream)

    def check_stream(self, stream: Any) -> None:
        cuda_stream_handle(stream)

    def _submit(self, direction: Direction, plan: Plan, stream: Any) -> Completion:
        caller = cuda_stream_handle(stream)
        lane = self._lanes[direction]
        ids, events = None, []
        try:
            with self._guard:
                events.append(self._events.take())
                events.append(self._events.take())
            start, done = events
            if len(plan.ids):
                ids = self._ids.take(len(plan.ids))
                ids.ids[: len(plan.ids)] = plan.ids
        except DeviceError as refusal:
            with self._guard:
                for event in events:
                    self._events.give(event)
            return Failed(TransferError(f"a {direction.value} of {plan.nbytes} bytes could not be prepared: {refusal}"))
        with lane.lock:
            error, last = nogil.issue(
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
            )
            lane.turn = (lane.turn + len(plan.chunks)) % self._count
        failure = None
        if error or last:
            text = cu.describe(cu.api(), error or last)
            failure = TransferError(f"a {direction.value} of {plan.nbytes} bytes could not be issued: {text}")
        if last:  # not even an event can be recorded, so nothing says when the work ends: wait for all of it
            self._drain()
            self.recycle(start, done, ids)
            return Failed(failure or TransferError("no event could be recorded"))
        return CudaCompletion(self, start, done, ids, failure)

    def _drain(self) -> None:
        with contextlib.suppress(DeviceError), cu.current(self.device.context) as driver:
            driver.cuCtxSynchronize()

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
