"""Runs every case in Numba's simulator. A process of its own, because the simulator replaces ``numba.cuda``.

Started by test_simulator.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate``; prints one line a case.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.kernels import compute, digest, move, paged, reading, resident, shares
from kvortex.kernels import warp as kernels_warp
from tests.kernels import warp
from tests.kernels.cases import CASES, GUARD, Case, numbers
from tests.naive_digest import sums as naive_sums

lanes = [0]
_store16 = move.store16


def counted(address: int, words: object) -> None:
    lanes[0] += 1
    _store16(address, words)


def aligned(data: npt.NDArray[Any], nbytes: int) -> npt.NDArray[Any]:
    return data[-data.ctypes.data % 256 // data.itemsize :][: nbytes // data.itemsize]


def table_of(nbytes: int) -> npt.NDArray[np.uint64]:
    """The digests' numbers at a multiple of 256."""
    whole = numbers(nbytes)
    table = aligned(np.zeros(whole.size + 64, np.uint64), whole.nbytes)
    table[:] = whole
    return table


def apart(count: int, n_pieces: int) -> tuple[npt.NDArray[np.uint64], tuple[np.uint64, ...]]:
    """Cells for the sums of each piece, and what a kernel is told of them; two cells more from record to record."""
    cells = np.zeros((count, n_pieces + 1, 2), np.uint64)
    return cells, (np.uint64(cells.ctypes.data), np.uint64(cells.strides[0]), np.uint64(16))


def run(case: Case, direction: str, grid: int, threads: int, digests: bool = False) -> None:
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, case.memory_bytes + 256, np.uint8)
    staging = rng.integers(0, 256, case.staging_bytes + 256, np.uint8)
    memory = memory[-memory.ctypes.data % 256 :][: case.memory_bytes]
    staging = staging[-staging.ctypes.data % 256 :][: case.staging_bytes]
    pieces = case.pieces.astype(np.uint64)
    pieces[:, 0] += np.uint64(memory.ctypes.data)
    ids = np.array(case.blocks, np.int32)
    expected = case.gathered(memory, staging), case.scattered(memory, staging)
    before = memory.copy(), staging.copy()
    lanes[0] = 0
    # A kernel that knows the only page must not look it up.
    only, listed = (ids[0], ids + np.int32(1000)) if len(ids) == 1 else (np.int32(-1), ids)
    begin, pitch = np.uint64(staging.ctypes.data + GUARD), np.uint64(case.pitch)
    counter = np.zeros(1, np.uint32)
    values = (begin, pieces.reshape(-1), len(pieces), listed, len(ids), pitch, only, np.uint64(counter.ctypes.data))
    warp.before_launch()
    if digests:
        table, sums = table_of(sum(case.sizes)), np.full((len(ids), 2), 5, np.uint64)
        kernel = cuda.jit(getattr(paged, direction + "_digest"))
        numbers_at = np.uint64(table.ctypes.data)
        kernel[grid, threads](*values, numbers_at, np.uint64(sums.ctypes.data), np.uint64(16), np.uint64(0))
        pages = expected[1] if direction == "scatter" else before[0]
        assert (sums - np.uint64(5)).tolist() == [list(pair) for pair in case.sums(pages)]
        lanes[0] = 0
        cells, where = apart(len(ids), len(pieces))
        kernel[grid, threads](*values, numbers_at, *where)
        assert cells.sum(1, np.uint64).tolist() == [list(pair) for pair in case.sums(pages)]
        assert cells[:, :-1].any(2).all() and not cells[:, -1].any(), "each piece has sums of its own"
    else:
        cuda.jit(getattr(paged, direction))[grid, threads](*values)
    assert not counter.any(), "the next launch would find shares taken"
    if all(pieces[0, :2] % 16 == 0) and case.pitch % 16 == 0:
        assert lanes[0] >= len(ids) * int(pieces[:, 3].sum() // 16), "aligned pages went through narrow lanes"
    if direction == "gather":
        np.testing.assert_array_equal(staging, expected[0])
        np.testing.assert_array_equal(memory, before[0])
    else:
        np.testing.assert_array_equal(memory, expected[1])
        np.testing.assert_array_equal(staging, before[1])


def run_resident(case: Case, direction: str, grid: int, threads: int, digests: bool = False) -> None:
    """The records in two chunks, and a chunk of none between them; each has a buffer and flags of its own."""
    rng = np.random.default_rng(2)
    memory = rng.integers(0, 256, case.memory_bytes + 256, np.uint8)
    staging = rng.integers(0, 256, case.staging_bytes + 256, np.uint8)
    memory = memory[-memory.ctypes.data % 256 :][: case.memory_bytes]
    staging = staging[-staging.ctypes.data % 256 :][: case.staging_bytes]
    whole = Case(**{**vars(case), "first": 0}).pieces.astype(np.uint64)
    whole[:, 0] += np.uint64(memory.ctypes.data)
    ids = np.array(case.blocks, np.int32)
    expected = case.gathered(memory, staging), case.scattered(memory, staging)
    ready, done = np.array([3, 2**32 - 1, 5], np.uint32), np.array([7, 2**32 - 1, 0], np.uint32)
    half = (len(ids) + 1) // 2
    rows = np.zeros((3, resident.ROW_CELLS), np.uint64)
    for at, (first, count) in enumerate([(0, half), (half, 0), (half, len(ids) - half)]):
        begin = staging.ctypes.data + GUARD + first * case.pitch - case.begin
        flags = (ready.ctypes.data + 4 * at, ready[at], done.ctypes.data + 4 * at)
        rows[at] = (begin, first, count, case.first, len(case.pieces), *flags)
    values = (rows.reshape(-1), len(rows), whole.reshape(-1), ids, np.uint64(case.pitch))
    if digests:
        pages = expected[1] if direction == "scatter" else memory.copy()
        table, sums = table_of(sum(case.sizes)), np.zeros((len(ids), 2), np.uint64)
        kernel = cuda.jit(getattr(resident, direction + "_resident_digest"))
        kernel[grid, threads](*values, np.uint64(table.ctypes.data), np.uint64(sums.ctypes.data))
        assert sums.tolist() == [list(pair) for pair in case.sums(pages)]
    else:
        cuda.jit(getattr(resident, direction + "_resident"))[grid, threads](*values)
    np.testing.assert_array_equal(staging if direction == "gather" else memory, expected[direction == "scatter"])
    total = np.uint32(grid * threads)
    assert done.tolist() == [7 + total, total - 1, total], "every thread raises each chunk's flag once, and it wraps"


def run_reading(case: Case, grid: int, threads: int) -> None:
    """Pages, and then the same memory as buffers, one of them empty."""
    rng = np.random.default_rng(3)
    memory = aligned(rng.integers(0, 256, case.memory_bytes + 256, np.uint8), case.memory_bytes)
    pieces = case.pieces.astype(np.uint64)
    pieces[:, 0] += np.uint64(memory.ctypes.data)
    ids, table = np.array(case.blocks, np.int32), table_of(max(sum(case.sizes), memory.size))
    sums = np.zeros((len(ids), 2), np.uint64)
    only, listed = (ids[0], ids + np.int32(1000)) if len(ids) == 1 else (np.int32(-1), ids)
    where = np.uint64(table.ctypes.data), np.uint64(sums.ctypes.data), np.uint64(16), np.uint64(0)
    values, at_once = (pieces.reshape(-1), len(pieces), listed, len(ids), only), (np.uint64(0), np.uint32(0))
    cuda.jit(reading.read_pages)[grid, threads](*values, *where, *at_once)
    assert sums.tolist() == [list(pair) for pair in case.sums(memory)]
    cells, into = apart(len(ids), len(pieces))
    data, flag = memory.copy(), np.array([0, 0xEE], np.uint32)
    awaited = np.uint64(flag.ctypes.data), np.uint32(0)

    def bring() -> None:
        """A DMA, in two parts of which the first raises the flag of another one; 0 comes behind 2**32 - 1."""
        for part, value in ((slice(None, None, 2), 0xFFFFFFFF), (slice(1, None, 2), 0)):
            time.sleep(0.02)
            memory[part] = data[part]
            flag[0] = value

    def read_late(kernel: Any, *arguments: Any) -> None:
        flag[0], memory[:] = 0xFFFFFFFD, 0
        thread = threading.Thread(target=bring)
        thread.start()
        cuda.jit(kernel)[grid, threads](*arguments, *awaited)
        thread.join()

    read_late(reading.read_pages, *values, where[0], *into)
    assert cells.sum(1, np.uint64).tolist() == sums.tolist() and cells[:, :-1].any(2).all() and flag.tolist() == [0, 0xEE]
    spans = [(case.starts[0], 4200), (0, 0), (case.starts[-1] + 1, 61), (0, memory.size)]
    spans = [(first, min(count, memory.size - first)) for first, count in spans]
    buffers = np.array([(memory.ctypes.data + first, count) for first, count in spans], np.uint64)
    sums = np.zeros((len(spans), 2), np.uint64)
    most = -(-max(count for _, count in spans) // reading.BUFFER_PIECE)
    values = (buffers.reshape(-1), most, ids, len(spans), np.int32(-1))
    cuda.jit(reading.read_buffers)[grid, threads](*values, where[0], np.uint64(sums.ctypes.data), *where[2:], *at_once)
    assert sums.tolist() == [list(naive_sums(memory[first:][:count].tobytes())) for first, count in spans]
    cells, into = apart(len(spans), most)
    read_late(reading.read_buffers, *values, where[0], *into)
    assert cells.sum(1, np.uint64).tolist() == sums.tolist() and cells[-1, :-1].any(1).all()


def run_compute(grid: int, threads: int) -> None:
    counter = np.zeros(1, np.uint32)
    cuda.jit(compute.compute)[grid, threads](np.uint64(counter.ctypes.data), 7, 3)
    assert counter.tolist() == [7 + grid], "each tile is taken once, and each CTA asks once in vain"


def main() -> int:
    assert config.ENABLE_CUDASIM
    move.store16 = digest.store16 = counted
    warp.install(shares, kernels_warp)
    paged.MOST_SHARES = 16  # so that there are shares of several pieces, too
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # sums are modulo 2**64
    for case in CASES:
        for direction in ("gather", "scatter"):
            run(case, direction, grid=2, threads=64)
            print(f"simulated {direction}: {case.name}", flush=True)
            run_resident(case, direction, grid=2, threads=64)
            print(f"simulated resident {direction}: {case.name}", flush=True)
            run(case, direction, grid=2, threads=64, digests=True)
            print(f"simulated {direction} with digests: {case.name}", flush=True)
            run_resident(case, direction, grid=2, threads=64, digests=True)
            print(f"simulated resident {direction} with digests: {case.name}", flush=True)
        run_reading(case, grid=2, threads=64)
        print(f"simulated reading: {case.name}", flush=True)
    run_compute(grid=2, threads=8)
    print("simulated compute", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
