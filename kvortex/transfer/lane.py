"""What one direction of an executor has on the GPU: streams, staging buffers, events, and the numbers of its launches."""

from __future__ import annotations

import contextlib
from typing import Any, TypeAlias

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError
from kvortex.memory.ids import IdBuffer
from kvortex.transfer import digesting as dg
from kvortex.transfer.digesting import Digesting
from kvortex.transfer.executor import Direction
from kvortex.transfer.issue import cells, resident
from kvortex.transfer.issue.dma import SCRATCH_CELLS
from kvortex.transfer.issue.holding import FLAGS, NOTHING, STREAMS
from kvortex.transfer.issue.pacing import PACED_S, addresses, hurry, pace
from kvortex.transfer.issue.submitting import RESIDENT, STREAMED, Submitter
from kvortex.transfer.plan import BASE_CELLS, IDS, INSTEAD, N_PIECES, PARAMETERS, STATUS, SUMS, Int64s, Plan

THREADS = 128  # of a CTA that stages: a small one finds room sooner beside a model's, and leaves it sooner
READING_THREADS = 512  # of one that only reads, and has much to read
ROW_WORDS = 2 * resident.ROW_CELLS  # of an IdBuffer's int32
RESIDENT_THREADS = 512  # of kvortex.kernels.resident, which needs numba.cuda to import


Job: TypeAlias = "tuple[int, tuple[Any, ...]]"  # of kvortex.transfer.issue.submitting
_AT_ONCE = 32  # calls of the driver, of a hundred microseconds at most in all, that are not worth waking a thread for
_FEW_THREADS = 128  # of a CTA that only reads, where there is so little that it is to be spread over all multiprocessors
_READING_LAUNCHES = 2  # times the CTAs of a launch, for one that only reads: as many as keep the bus of the VRAM busy


def is_short(plan: Plan) -> bool:
    """Whether a plan takes so few calls of the driver that its caller had best make them."""
    return are_few(len(plan.chunks), len(plan.copies) + plan.batch.shape[1] // 4 + len(plan.launches))


def are_few(chunks: int, others: int) -> bool:
    """The same of so many chunks, and copies and launches that these take."""
    return bool(3 * chunks + others <= _AT_ONCE)


def _kind(plan: Plan) -> int:
    """Of :mod:`kvortex.transfer.issue.holding`."""
    if plan.ctas:
        return FLAGS
    return STREAMS if len(plan.chunks) and plan.chunks[0, N_PIECES] and not plan.chunks[0, INSTEAD] else NOTHING


class Lane:
    """Streams, staging buffers and kernels of one direction, and who issues plans to them, one at a time.

    Parameters
    ----------
    device
    direction
    kernel, resident_kernel
        Handles; 0 where no plan has kernels.
    count
        Streams that copies are dealt to, and kernels that use no staging buffer.
    buffers
        Addresses of staging buffers, at least ``count``; each has a stream for launches of its own.
    halves
        The same memory as a resident kernel uses it.
    ctas
        Most CTAs of a launch that serves one buffer, or none. One launch for each buffer may run at a time.
    flags
        Address of ``2 * resident.FLAG_BYTES`` bytes of VRAM for each of ``halves``, zeroed.
    table, offsets
        Address of the pieces in VRAM, and their record offsets.
    counters
        Address of ``COUNTER_BYTES`` bytes of VRAM for each of ``buffers``, zeroed.
    works
        Addresses of what else belongs to each of ``buffers``; None where nothing does.
    buffer_bytes
        Of each of ``buffers``.
    link_rate
        Bytes per second that the link carries one way.
    link_share
        What paced copies are to take of that.
    flag
        Address of 4 bytes of VRAM, zeroed, for :mod:`kvortex.transfer.issue.early`, which has two streams of its own: what is
        on the others may wait for its callers. 0 where nothing can be read early.

    Attributes
    ----------
    copy_stream : int
        The stream of all copies between staging buffers and the host.
    reads_early : bool
        Whether kernels may wait on the GPU for what DMAs bring.
    every_stream, ordinary_streams : (n,) int64
        Handles of all its streams; and of all but those of what is read early.
    """

    def __init__(
        self,
        device: CudaDevice,
        direction: Direction,
        kernel: int,
        resident_kernel: int,
        count: int,
        buffers: list[int],
        halves: list[int],
        ctas: int,
        flags: int,
        table: int,
        offsets: Int64s,
        counters: int,
        works: list[int] | None = None,
        buffer_bytes: int = 0,
        link_rate: float = 1.0,
        link_share: float = 1.0,
        flag: int = 0,
    ) -> None:
        self._device, self._flag, self.reads_early = device, flag, flag != 0
        self._submitter: Submitter | None = None
        self._ahead_bytes, self._link_rate = (len(buffers) - 1) * buffer_bytes, link_rate
        self.cells = np.zeros(cells.LANE_CELLS, np.int64)
        self._streams: list[int] = []
        self._events: list[int] = []
        try:
            self._open(len(buffers), 2 * self.reads_early, behind=direction is Direction.SAVE)
            self._submitter = Submitter(f"kvortex-{direction.value}", self.cells)
        except BaseException:
            self.close()
            raise
        self.every_stream = np.array(self._streams, np.int64)
        self.ordinary_streams, self._early = self.every_stream[: len(buffers) + 5], self.every_stream[len(buffers) + 5 :]
        handles = self.ordinary_streams.tolist()
        *streams, kernel_stream, self.copy_stream, flag_stream, self._digest_stream, join_stream = handles
        joins, others = self._events[: len(streams)], self._events[len(streams) :][:5]
        kernel_event, copy_event, flag_event, caller_event, self._digest_event = others
        self._all = np.array([[*streams, kernel_stream, self.copy_stream], [*joins, kernel_event, copy_event]], np.int64)
        self.streams, self.joins = self._all[:, : len(streams)]
        self._copying = self._all[:, -1:]
        self._handing = np.array(self._events[len(streams) + 5 :], np.int64).reshape(2, -1)
        self._count = count
        self.buffers, self.offsets = np.array(buffers, np.int64), np.ascontiguousarray(offsets)
        self.works = np.zeros_like(self.buffers) if works is None else np.array(works, np.int64)
        self._halves = np.array(halves, np.int64)
        self.cells[cells.CONTEXT] = int(device.context)
        self.cells[cells.KERNEL] = kernel
        self.cells[cells.THREADS] = THREADS
        self.cells[cells.MAX_CTAS] = ctas
        self.cells[cells.TABLE], self.cells[cells.COUNTERS] = table, counters
        self.cells[cells.JOIN_STREAM] = join_stream
        self.cells[cells.CALLER_EVENT] = caller_event
        self._caller_event = np.array([caller_event], np.int64)
        self.cells[cells.TO_HOST] = direction is Direction.SAVE
        self.cells[cells.COPY_STREAM], self.cells[cells.COPY_EVENT] = self.copy_stream, copy_event
        self.cells[cells.NAP], self.cells[cells.CLOCK] = addresses()
        self.cells[cells.FS_OF_BYTE] = pace(link_rate, link_share)
        self._ring = np.array([kernel_stream, kernel_event, resident_kernel, 0, flags, flag_stream, flag_event], np.int64)
        self._filled = np.zeros((2, len(halves)), np.int64)
        self._turns = {kind: np.zeros(1, np.int64) for kind in (NOTHING, STREAMS, FLAGS)}
        self._holder = np.array([NOTHING], np.int64)  # of the staging buffers
        self._parameters = np.zeros(max(PARAMETERS, resident.PARAMETERS), np.int64)
        self._pointers = self._parameters.ctypes.data + 8 * np.arange(len(self._parameters), dtype=np.int64)
        self._scratch = np.zeros(SCRATCH_CELLS, np.int64)

    def job(
        self,
        functions: Int64s,
        plan: Plan,
        caller: int,
        after: Int64s,
        events: Int64s,
        ids: IdBuffer | None,
        digesting: Digesting | None,
        outcome: Int64s,
    ) -> Job:
        """All that it takes to put a plan on the GPU, after what is on ``caller`` then, or, with ``NO_STREAM``, after the
        events ``after``; ``outcome`` will tell how that went. ``ids`` has room as :func:`kvortex.transfer.digesting.room_for`
        says.

        ``events`` are recorded before, after, and at each mark. See :func:`kvortex.transfer.issue.plans.issue`.
        """
        if caller != cells.NO_STREAM:
            after = self._caller_event
        kind = _kind(plan)
        digest = self._digest(plan, ids, digesting)
        if kind == FLAGS:
            return RESIDENT, self._resident_job(functions, plan, caller, after, events, ids, digest, outcome)
        # Batches of short copies need many streams: at 32 KiB 8 of them brought 49 GB/s on an H100, and one 32 / 30.
        used = self._count if kind == NOTHING and not plan.batch.size else len(self.streams)
        return STREAMED, (
            kind,
            self._holder,
            *self._all,
            functions,
            self.cells,
            self._early if digest[dg.FLAG] else self.streams[:used],
            self.buffers[:used],
            self.joins[:used],
            np.ascontiguousarray(self._handing[:, :used]),
            self._turns[kind],
            caller,
            after,
            events[0],
            events[1],
            plan.chunks,
            plan.copies,
            plan.batch,
            plan.pitch,
            plan.marks,
            events[2:],
            digest,
            plan.launches,
            self.works[:used],
            self._bases(plan, ids, digesting),
            self._parameters,
            self._pointers,
            self._scratch,
            outcome,
        )

    def _bases(self, plan: Plan, ids: IdBuffer | None, digesting: Digesting | None) -> Int64s:
        """What the parameters of launches are relative to, but for what a chunk's buffer says."""
        bases = np.zeros(BASE_CELLS, np.int64)
        if ids is not None and len(plan.launches):
            room = dg.room_for(plan, digesting, ROW_WORDS)
            bases[[IDS, SUMS, STATUS]] = ids.mirror + 4 * np.array([room.listed, room.sums, room.status])
        return bases

    def _digest(self, plan: Plan, ids: IdBuffer | None, digesting: Digesting | None) -> Int64s:
        """Puts ids and zeros where kernels find them; cells of :mod:`kvortex.transfer.digesting`."""
        room = dg.room_for(plan, digesting, ROW_WORDS)
        if ids is None:
            return dg.NO_DIGESTS
        reading = digesting.reading if digesting is not None else None
        listed = plan.ids if reading is None else reading.listed
        ids.ids[room.listed : room.listed + len(listed)] = listed
        found = dg.NO_DIGESTS.copy()
        if len(listed) == 1:
            found[dg.ONLY] = listed[0]
        # Where kernels find what is listed, and leave sums. What is sent ahead is read from VRAM: over the link each CTA would
        # wait for its ids behind the copies that are on it.
        here = ids.address if digesting is None or digesting.apart else ids.mirror
        found[dg.IDS] = here + 4 * room.listed
        if digesting is None:
            return found
        ids.ids[room.sums : room.words] = 0
        found[dg.NUMBERS], found[dg.SUMS_BYTES] = digesting.numbers, 4 * (room.words - room.sums)
        found[dg.SUMS], found[dg.SUMS_HOST] = here + 4 * room.sums, ids.address + 4 * room.sums
        found[dg.RECORD_BYTES] = 4 * dg.SUM_WORDS * max(1, digesting.apart)
        if digesting.apart:
            found[dg.PIECE_BYTES] = 4 * dg.SUM_WORDS
        found[dg.SENT_TO], found[dg.SENT_FROM] = ids.mirror + 4 * room.listed, ids.address + 4 * room.listed
        found[dg.SENT_BYTES] = 4 * (room.words - room.listed)
        found[dg.STREAM], found[dg.EVENT] = self._digest_stream, self._digest_event
        if reading is not None:
            found[dg.KERNEL] = reading.kernel
            found[dg.TABLE] = reading.table or found[dg.IDS]
            found[dg.N_PIECES], found[dg.N_BLOCKS] = reading.n_pieces, digesting.count
            found[dg.FLAG] = self._flag if digesting.early else 0
            found[dg.CTAS], found[dg.THREADS] = self._reading_shape(reading.n_pieces * digesting.count, digesting.early)
        return found

    def _reading_shape(self, pieces: int, early: bool) -> tuple[int, int]:
        """CTAs, and threads of each, of a kernel that reads so many pieces, a warp one at a time. One that is launched early
        has half of the multiprocessors at most, and there what it takes to have all pieces in flight."""
        most, few = _READING_LAUNCHES * int(self.cells[cells.MAX_CTAS]), [_FEW_THREADS]
        if early:
            most, few = max(1, self._device.multiprocessors // 2), [_FEW_THREADS, 2 * _FEW_THREADS]
        threads = next((each for each in few if pieces <= most * (each // 32)), READING_THREADS)
        return min(most, -(-pieces // (threads // 32))), threads

    def _resident_job(
        self,
        functions: Int64s,
        plan: Plan,
        caller: int,
        after: Int64s,
        events: Int64s,
        ids: IdBuffer | None,
        digest: Int64s,
        outcome: Int64s,
    ) -> tuple[Any, ...]:
        assert ids is not None
        words = ROW_WORDS * len(plan.chunks)
        sent = 4 * (words + len(plan.ids))
        if digest[dg.SUMS_BYTES]:
            sent = int(digest[dg.SUMS] + digest[dg.SUMS_BYTES]) - ids.mirror
        rows = ids.ids[:words].view(np.int64).reshape(-1, resident.ROW_CELLS)
        ring = self._ring.copy()
        ring[resident.THREADS] = plan.ctas * RESIDENT_THREADS
        return (
            self._holder,
            *self._all,
            functions,
            self.cells,
            ring,
            plan.ctas,
            self._copying[0],
            self._halves,
            self._copying[1],
            self._turns[FLAGS],
            self._filled,
            self.offsets,
            caller,
            after,
            events[0],
            events[1],
            plan.chunks,
            plan.copies,
            plan.pitch,
            plan.marks,
            events[2:],
            rows,
            np.array([ids.address, ids.mirror, sent], np.int64),
            digest,
            np.empty((4, max(len(self._halves), len(plan.chunks))), np.int64),
            self._parameters,
            self._pointers,
            self._scratch,
            outcome,
        )

    def issue(self, job: Job) -> bool:
        """Issues a job, if nobody else issues one here. See :meth:`kvortex.transfer.issue.submitting.Submitter.issue`."""
        assert self._submitter is not None
        return self._submitter.issue(*job)

    def leave(self, job: Job) -> None:
        """Leaves a job to the lane's thread. See :meth:`kvortex.transfer.issue.submitting.Submitter.leave`."""
        assert self._submitter is not None
        self._submitter.leave(*job)

    def paces(self, plan: Plan) -> bool:
        """Whether a plan that moves beside a computing model is worth a thread that waits with its kernels."""
        return _kind(plan) == STREAMS and min(plan.nbytes, self._ahead_bytes) >= PACED_S * self._link_rate

    def hurry(self, place: int) -> None:
        """Paces no plan any more up to that place of the queue, since somebody waits until it is issued."""
        hurry(self.cells, place)

    def _open(self, count: int, more: int, *, behind: bool) -> None:
        with cu.current(self._device.context) as driver:
            low, high = cu.check(driver.cuCtxGetStreamPriorityRange(), "cuCtxGetStreamPriorityRange")
            # High priority: a short gather must not queue behind a model's kernels. Loads before saves,
            # since a model waits for them. (A smaller number is a higher priority.)
            priority = min(high + 1, low) if behind else high
            for _ in range(count + 5 + more):
                # Non-blocking: not ordered with the legacy default stream but through events.
                flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._streams.append(int(cu.check(driver.cuStreamCreateWithPriority(flags, priority), "cuStreamCreate")))
            no_timing = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
            for _ in range(3 * count + 5):
                self._events.append(int(cu.check(driver.cuEventCreate(no_timing), "cuEventCreate")))

    @property
    def idle(self) -> bool:
        """Whether its thread has nothing to issue."""
        return self._submitter is None or self._submitter.idle

    def close(self) -> None:
        """Frees all. Nothing may be in flight."""
        if self._submitter is not None:
            self._submitter.close()
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            while self._events:
                driver.cuEventDestroy(self._events.pop())
            self.every_stream = self.ordinary_streams = np.empty(0, np.int64)  # none is asked any more
            while self._streams:
                driver.cuStreamDestroy(self._streams.pop())
