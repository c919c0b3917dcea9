"""Runs every case in Numba's simulator. A process of its own, because the simulator replaces ``numba.cuda``.

Started by test_simulator.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate``; prints one line a case.
"""

from __future__ import annotations

import sys

import numpy as np
from numba import cuda
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.kernels import compute, move, paged, resident
from tests.kernels.cases import CASES, GUARD, Case

lanes = [0]
_store16 = move.store16


def counted(address: int, words: object) -> None:
    lanes[0] += 1
    _store16(address, words)


def run(case: Case, direction: str, grid: int, threads: int) -> None:
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
    kernel = cuda.jit(getattr(paged, direction))
    kernel[grid, threads](
        np.uint64(staging.ctypes.data + GUARD), pieces.reshape(-1), len(pieces), ids, len(ids), np.uint64(case.pitch)
    )
    if all(pieces[0, :2] % 16 == 0) and case.pitch % 16 == 0:
        assert lanes[0] >= len(ids) * int(pieces[:, 3].sum() // 16), "aligned pages went through narrow lanes"
    if direction == "gather":
        np.testing.assert_array_equal(staging, expected[0])
        np.testing.assert_array_equal(memory, before[0])
    else:
        np.testing.assert_array_equal(memory, expected[1])
        np.testing.assert_array_equal(staging, before[1])


def run_resident(case: Case, direction: str, grid: int, threads: int) -> None:
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
    kernel = cuda.jit(getattr(resident, direction + "_resident"))
    kernel[grid, threads](rows.reshape(-1), len(rows), whole.reshape(-1), ids, np.uint64(case.pitch))
    np.testing.assert_array_equal(staging if direction == "gather" else memory, expected[direction == "scatter"])
    total = np.uint32(grid * threads)
    assert done.tolist() == [7 + total, total - 1, total], "every thread raises each chunk's flag once, and it wraps"


def run_compute(grid: int, threads: int) -> None:
    counter = np.zeros(1, np.uint32)
    cuda.jit(compute.compute)[grid, threads](np.uint64(counter.ctypes.data), 7, 3)
    assert counter.tolist() == [7 + grid], "each tile is taken once, and each CTA asks once in vain"


def main() -> int:
    assert config.ENABLE_CUDASIM
    move.store16 = counted
    for case in CASES:
        for direction in ("gather", "scatter"):
            run(case, direction, grid=2, threads=64)
            print(f"simulated {direction}: {case.name}", flush=True)
            run_resident(case, direction, grid=2, threads=64)
            print(f"simulated resident {direction}: {case.name}", flush=True)
    run_compute(grid=2, threads=8)
    print("simulated compute", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
