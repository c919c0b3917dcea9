"""Measures transfers of every route between memory of its own, by the executor that carries out those of engines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType

import numpy as np

from kvortex.devices import driver as cu
from kvortex.devices.cuda import CudaDevice
from kvortex.errors import DeviceError, TransferError, TransferTimeoutError
from kvortex.memory.arena import PinnedArena
from kvortex.transfer.cuda import CudaExecutor, resident_kernels_can_run
from kvortex.transfer.cuda_completion import CudaCompletion
from kvortex.transfer.executor import Completion, Direction, poll
from kvortex.transfer.plan import Int64s, Pool
from kvortex.transfer.profiles.load import Load
from kvortex.transfer.profiles.measurements import seconds_each
from kvortex.transfer.profiles.profile import Profile
from kvortex.transfer.routes import Route

FRAGMENTS = 64  # of a record: keys and values of 32 layers
TRANSFER_S = 5e-3  # that the largest transfer takes, about
LEAST_BYTES, MOST_BYTES = 16 << 20, 256 << 20  # of the largest transfer
CHECKED_BYTES = 16 << 20
SPAN = 16  # kernels of a load in the time that others are compared with
_LONGEST_WAIT_S, _LONGEST_ISSUE_S = 60.0, 10.0


class Bench:
    """Pages in VRAM, and a pinned pool for as many bytes.

    Parameters
    ----------
    device
    profile
        A guess, for the size of the largest transfer.
    unit
        That the largest transfer is a multiple of: bytes of the largest record.

    Attributes
    ----------
    nbytes : int
        Of the largest transfer.
    multiprocessors : int

    Raises
    ------
    DeviceError, PinnedMemoryError, BuildError
        Memory or kernels cannot be had. Nothing stays taken.
    """

    def __init__(self, device: CudaDevice, profile: Profile, unit: int) -> None:
        self._device, self.multiprocessors = device, device.multiprocessors
        wanted = min(max(int(profile.link_rate * TRANSFER_S), LEAST_BYTES), MOST_BYTES)
        self.nbytes = -(-wanted // unit) * unit
        self._executor: CudaExecutor | None = None
        self._key: tuple[int, ...] = ()
        self._load: Load | None = None
        self._arena: PinnedArena | None = None
        self._rng = np.random.default_rng(1)
        self._pages = device.allocate(self.nbytes)
        try:
            self._arena = PinnedArena(device, self.nbytes, self.nbytes)
            self._load = Load(device)
        except BaseException:
            self.close()
            raise

    def routes(self) -> tuple[Route, ...]:
        """Those that can run here."""
        can = {Route.RESIDENT: resident_kernels_can_run(self._device), Route.BATCHED: cu.has_batched_copies()}
        every = Route.STAGED, Route.RESIDENT, Route.STRIDED, Route.BATCHED, Route.MAPPED
        return tuple(route for route in every if can.get(route, True))

    def link(self, profile: Profile, direction: Direction) -> float:
        """Bytes per second of one contiguous DMA."""
        return self.copies(profile, direction, self.nbytes)

    def copies(self, profile: Profile, direction: Direction, nbytes: int) -> float:
        """Bytes per second of contiguous DMAs of ``nbytes`` each, all that fit in the memory."""
        count = self.nbytes // nbytes
        at = np.arange(count)
        executor = self._open(profile, 0, nbytes)
        addresses, sizes = self._pages.address + nbytes * at, np.full(count, nbytes)
        return self._rate(executor.prepare_buffers(direction, addresses, sizes, at, 0), count * nbytes)

    def idle(self, profile: Profile, direction: Direction, fragment_bytes: int, nbytes: int, route: Route) -> float:
        """Bytes per second of one transfer."""
        executor = self._open(profile, fragment_bytes, FRAGMENTS * fragment_bytes)
        order = self._rng.permutation(nbytes // (FRAGMENTS * fragment_bytes))
        return self._rate(self._blocks(executor, direction, order, route, beside=False), nbytes)

    def beside(self, profile: Profile, direction: Direction, fragment_bytes: int, route: Route) -> tuple[float, float]:
        """Bytes per second of transfers, two in flight, beside a computation; and its time over its time alone."""
        executor, load = self._open(profile, fragment_bytes, FRAGMENTS * fragment_bytes), self._busy()
        order = self._rng.permutation(self.nbytes // (FRAGMENTS * fragment_bytes))
        load.reset()
        load.queue(2)
        marks = [load.queue(kernels) for kernels in (0, SPAN, SPAN, 3 * SPAN)]
        load.queue(SPAN + SPAN // 2)  # to go on while the last transfers end
        _, alone, primed, last = marks

        running: list[CudaCompletion] = []
        left: list[CudaCompletion] = []  # of which not all is issued: who waited for that would hurry them
        behind: list[int] = []
        load.wait(alone)
        deadline = time.monotonic() + _LONGEST_WAIT_S
        try:
            while not load.passed(last):
                if time.monotonic() > deadline:
                    raise TransferTimeoutError(f"a computation of milliseconds did not end in {_LONGEST_WAIT_S} s")
                while len(running) < 2:
                    running.append(self._blocks(executor, direction, order, route, beside=True))
                    running[-1].start()
                    left.append(running[-1])
                if left and left[0].issued:
                    behind.append(load.behind(left.pop(0)))
                if running[0].query():
                    self._finish(running[0])
                    del running[0]
            for completion in running:
                self._finish(completion)
        except BaseException:
            executor.hurry_all()  # and a thread reads what they consist of until they are issued
            poll(lambda: all(completion.issued for completion in running), time.monotonic() + _LONGEST_ISSUE_S)
            raise
        first = load.queue(2)
        after = load.seconds(first, load.queue(SPAN))
        span = load.seconds(primed, last)
        slowdown = span / 3 / ((load.seconds(marks[0], alone) + after) / 2)
        ends = [end for end in (load.seconds(primed, event) for event in behind) if 0 <= end <= span]
        return self.nbytes / seconds_each(ends, span), slowdown

    def check(self, profile: Profile, fragment_bytes: int, route: Route) -> None:
        """Moves bytes there and back.

        Raises
        ------
        TransferError
            Not all came back.
        """
        executor = self._open(profile, fragment_bytes, FRAGMENTS * fragment_bytes)
        record = FRAGMENTS * fragment_bytes
        count = max(1, min(self.nbytes, CHECKED_BYTES) // record)
        offsets = self.nbytes // FRAGMENTS * np.arange(FRAGMENTS)
        data = self._rng.integers(0, 256, (FRAGMENTS, count * fragment_bytes), np.uint8)
        for offset, row in zip(offsets.tolist(), data, strict=True):
            self._pages.write(row, offset)
        order = self._rng.permutation(count)
        for direction in (Direction.SAVE, Direction.LOAD):
            self._rate(self._blocks(executor, direction, order, route, beside=False), 1)
            with cu.current(self._device.context) as driver:
                if direction is Direction.SAVE:
                    cu.check(driver.cuMemsetD8(self._pages.address, 0, self.nbytes), "cuMemsetD8")
                    cu.check(driver.cuCtxSynchronize(), "cuCtxSynchronize")
        for offset, row in zip(offsets.tolist(), data, strict=True):
            if not np.array_equal(self._pages.read(offset, row.nbytes), row):
                raise TransferError(f"fragments of {fragment_bytes} bytes do not come back from the {route.value} route")

    def _busy(self) -> Load:
        assert self._load is not None
        return self._load

    def _open(self, profile: Profile, fragment_bytes: int, slot_bytes: int) -> CudaExecutor:
        """An executor for records of one shape: the one that there is, where only numbers of resident CTAs differ."""
        key = (fragment_bytes, slot_bytes, profile.streams, profile.buffers, profile.buffer_bytes, profile.staged_ctas)
        if self._executor is None or key != self._key:
            self._close_executor()
            assert self._arena is not None
            pool = Pool(self._arena.address, slot_bytes, self.nbytes // slot_bytes)
            fragments, layers = self._layout(fragment_bytes)
            blocks = self.nbytes // slot_bytes
            budget = profile.staging_bytes
            digests = fragment_bytes > 0  # as engines have them, unless they are told otherwise; the link alone has none
            self._executor = CudaExecutor(self._device, fragments, layers, blocks, pool, budget, profile, digests=digests)
            self._key = key
        self._executor.resident_ctas = profile.resident_ctas, profile.resident_ctas_beside
        return self._executor

    def _layout(self, fragment_bytes: int) -> tuple[Int64s, Int64s]:
        """Fragments, each in a region of its own, and offsets of layers of two; none of length 0."""
        if not fragment_bytes:
            return np.empty((0, 4), np.int64), np.zeros(1, np.int64)
        at = np.arange(FRAGMENTS)
        base = self._pages.address + self.nbytes // FRAGMENTS * at
        rows = (base, np.full(FRAGMENTS, fragment_bytes), fragment_bytes * at, np.full(FRAGMENTS, fragment_bytes))
        return np.stack(rows, axis=1), 2 * fragment_bytes * np.arange(FRAGMENTS // 2 + 1)

    def _blocks(
        self, executor: CudaExecutor, direction: Direction, order: Int64s, route: Route, *, beside: bool
    ) -> CudaCompletion:
        """Blocks in any order of pages, and one after another in the pool."""
        executor.route, executor.beside_compute = route, beside
        made = executor.prepare_blocks(direction, order, np.arange(len(order)), 0)
        assert isinstance(made, CudaCompletion), "nothing here goes layer by layer"
        return made

    def _rate(self, completion: Completion, nbytes: int) -> float:
        completion.start()
        self._finish(completion)
        return nbytes / max(completion.seconds, 1e-9)

    def _finish(self, completion: Completion) -> None:
        if not poll(completion.query, time.monotonic() + _LONGEST_WAIT_S):
            raise TransferTimeoutError(f"a transfer of {self.nbytes} bytes at most was not done after {_LONGEST_WAIT_S} s")
        if completion.error is not None:
            raise completion.error

    def _close_executor(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()

    def close(self) -> None:
        """Waits for what may still run, and frees all."""
        steps: list[Callable[[], object]] = [self._close_executor]
        steps += [owner.close for owner in (self._load, self._arena) if owner is not None]
        with contextlib.suppress(DeviceError), cu.current(self._device.context) as driver:
            driver.cuCtxSynchronize()
        with contextlib.ExitStack() as stack:
            stack.callback(self._pages.free)
            for step in reversed(steps):
                stack.callback(step)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
