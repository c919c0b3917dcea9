"""Runs the kernels of ``cachegen`` in Numba's simulator, beside the host's twin. A process of its own, as simulate.py is.

Started by test_cachegen_kernels.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate_cachegen``; prints one line a
case.
"""

from __future__ import annotations

import sys

import numpy as np
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.codecs.on_device_cachegen import cells, constants
from kvortex.kernels import cachegen, cachegen_decode, cachegen_encode, plane, plane_count, plane_decode, plane_row
from kvortex.kernels import warp as kernels_warp
from tests.kernels import warp
from tests.kernels.cachegen_cases import CASES, GUARD, CacheGenCase, damages
from tests.kernels.simulate_plane import aligned
from tests.kernels.simulate_plane import bare_launch as launch


def placed(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 16."""
    made = aligned(array.nbytes, 0)
    made[:] = array
    return made


def run(case: CacheGenCase) -> None:
    n, codec = len(case.blocks), case.cachegen
    memory = case.memory.copy()
    fixed = placed(constants(codec))
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    staging = aligned(n * case.pitch + 2 * GUARD, 0xA5)
    counts = np.full((n, case.streams, 2), 0x5A5A5A5A, np.uint32)
    start = staging.ctypes.data + GUARD
    launch(cachegen_encode.cachegen_count, start, case.pitch, form, counts.ctypes.data, case.blocks, n, 1, grid=1, threads=64)
    launch(cachegen_encode.cachegen_encode, start, case.pitch, form, counts.ctypes.data, case.blocks, n, 1)
    assert (memory == case.memory).all()
    assert (staging[:GUARD] == 0xA5).all() and (staging[-GUARD:] == 0xA5).all()
    rows = staging[GUARD:-GUARD].reshape(n, case.pitch)
    assert not case.wrong(rows), f"{case.wrong(rows)} bytes differ from the host's"
    coded, sizes = case.coded()
    for row, size in zip(rows, sizes, strict=True):
        assert (row[64 if size < 0 else size :] == 0xA5).all(), "bytes behind a record stay as they are"
    memory[:] = 0x5A5A
    status = np.zeros(n, np.uint32)
    launch(cachegen_decode.cachegen_decode, start, case.pitch, form, status.ctypes.data, case.blocks, n, 1)
    assert (status == (sizes < 0)).all()
    back = np.empty((n, codec.shape.raw_bytes), np.uint8)
    assert (codec.decode_into(coded, back) == (sizes > 0)).all()
    wanted = case.pages_of(back)
    whole = sizes > 0
    assert (memory[:, case.blocks[whole]] == wanted[:, whole]).all()
    assert (memory[:, case.blocks[~whole]] == 0x5A5A).all(), "what was declined touches no page"


def run_damaged(case: CacheGenCase) -> None:
    """The same record, each time damaged in another way: told as the host tells it, and nothing outside its page changes."""
    codec = case.cachegen
    cases = damages(case)
    n = len(cases)
    rows = placed(np.stack(list(cases.values())).reshape(-1)).reshape(n, -1)
    memory = np.full((case.memory.shape[0], n + 2, *case.memory.shape[2:]), 0x5A5A, np.uint16)
    fixed, blocks = placed(constants(codec)), np.arange(1, n + 1, dtype=np.int32)
    form = cells(codec, case.fragments(memory.ctypes.data, n + 2), fixed.ctypes.data)
    status = np.zeros(n, np.uint32)
    launch(cachegen_decode.cachegen_decode, rows.ctypes.data, case.pitch, form, status.ctypes.data, blocks, n, 1)
    told = codec.decode_into(rows, np.empty((n, codec.shape.raw_bytes), np.uint8))
    assert not told.any(), [what for what, good in zip(cases, told, strict=True) if good]
    assert status.tolist() == [1] * n, dict(zip(cases, status.tolist(), strict=True))
    assert (memory[:, [0, -1]] == 0x5A5A).all()


def main() -> int:
    assert config.ENABLE_CUDASIM
    warp.install(plane, plane_row, plane_count, plane_decode, cachegen, cachegen_encode, cachegen_decode, kernels_warp)
    for case in CASES:
        run(case)
        print(f"simulated cachegen: {case.name}", flush=True)
    run_damaged(CASES[0])
    print("simulated cachegen: damaged records", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
