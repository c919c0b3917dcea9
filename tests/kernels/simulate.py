"""Runs every case in Numba's simulator. A process of its own, because the simulator replaces ``numba.cuda``.

Started by test_simulator.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate``; prints one line a case.
"""

from __future__ import annotations

import sys

import numpy as np
from numba import cuda
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.kernels import paged
from tests.kernels.cases import CASES, GUARD, Case

lanes = [0]
load16 = paged.load16


def counted(address: int) -> object:
    lanes[0] += 1
    return load16(address)


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


def main() -> int:
    assert config.ENABLE_CUDASIM
    paged.load16 = counted
    for case in CASES:
        for direction in ("gather", "scatter"):
            run(case, direction, grid=2, threads=64)
            print(f"simulated {direction}: {case.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
