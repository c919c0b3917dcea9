"""Runs the kernels of bounded loss in Numba's simulator, beside the host's twin. A process of its own, as simulate.py is.

Started by test_lossy_kernels.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate_lossy``; prints one line a case.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.codecs import RecordShape
from kvortex.codecs.on_device_lossy import cells, constants
from kvortex.digests.keys import kernel_numbers
from kvortex.kernels import coded_read, digest_staged, lossy, lossy_decode, lossy_encode, plane, shares, written
from kvortex.kernels import warp as kernels_warp
from tests.kernels import warp
from tests.kernels.lossy_cases import FILL, GUARD, SMALL, LossyCase
from tests.kernels.simulate_plane import aligned, bare_launch, launch
from tests.naive_digest import sums as naive_sums


def run(case: LossyCase) -> None:
    n, codec = len(case.rows), case.codec
    memory = aligned(case.memory.nbytes, 0).view(np.uint16).reshape(case.memory.shape)
    memory[:] = case.memory
    fixed = aligned(constants(codec).size, 0)
    fixed[:] = constants(codec)
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    staging = aligned(n * case.pitch + 2 * GUARD, 0xA5)
    counts = np.zeros(n, np.uint32)
    start = staging.ctypes.data + GUARD
    rows, numbers = staging[GUARD:-GUARD].reshape(n, case.pitch), kernel_numbers(case.pitch)
    for digests, run, grid, threads in ((True, case.run, 2, 64), (False, 2, 1, 64), (True, 2, 1, 32)):
        staging[:] = 0xA5
        sums, status = np.zeros((n, 2), np.uint64), np.zeros(n, np.uint32)
        where = numbers.ctypes.data, sums.ctypes.data if digests else 0, status.ctypes.data
        how = start, case.pitch, form, counts.ctypes.data, case.rows.ravel(), n, run, *where
        launch(lossy_encode.lossy_encode, *how, grid=grid, threads=threads)
        assert (memory == case.memory).all() and not counts.any()
        assert (staging[:GUARD] == 0xA5).all() and (staging[-GUARD:] == 0xA5).all()
        assert not case.wrong(rows), f"{case.wrong(rows)} bytes differ from the host's"
        assert (status == case.declined(rows)).all()
        for row, found in zip(rows[status == 0], sums[status == 0], strict=True):
            assert tuple(map(int, found)) == (naive_sums(row.tobytes()) if digests else (0, 0))
    decode(case, rows, memory, form)
    if case.hostile:  # damaged bodies too: what the host makes of them, and no more
        rows[:] = case.staging()
        rng = np.random.default_rng(9)
        rows[:, 64 : codec.slot_bytes] ^= rng.integers(0, 256, (n, codec.slot_bytes - 64)).astype(np.uint8)
        rows[0, 40] ^= 1
        rows[-1, 12] ^= 1
        decode(case, rows, memory, form)


def run_cramped(case: LossyCase) -> None:
    """No room for a record: there are headers, which say so, and zeros, and nothing is read from there."""
    n, pitch = len(case.rows), case.codec.slot_bytes - 16
    memory = aligned(case.memory.nbytes, 0).view(np.uint16).reshape(case.memory.shape)
    fixed = aligned(constants(case.codec).size, 0)
    fixed[:] = constants(case.codec)
    form = cells(case.codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    staging, words = aligned(n * pitch, 0xA5), np.zeros(n, np.uint32)
    tail = (case.rows.ravel(), n, case.run)
    numbers, sums, status = kernel_numbers(pitch), np.zeros((n, 2), np.uint64), np.zeros(n, np.uint32)
    where = numbers.ctypes.data, sums.ctypes.data, status.ctypes.data
    launch(lossy_encode.lossy_encode, staging.ctypes.data, pitch, form, words.ctypes.data, *tail, *where)
    rows = staging.reshape(n, pitch)
    assert case.declined(rows).all() and status.all() and not rows[:, 64:].any() and not words.any()
    rows[:, :64] = case.staging()[:, :64]
    launch(lossy_decode.lossy_decode, staging.ctypes.data, pitch, form, words.ctypes.data, *tail, 0, case.codec.tiles)
    assert words.all() and not memory.any()


def decode(case: LossyCase, rows: np.ndarray, memory: np.ndarray, form: np.ndarray) -> None:
    n = len(rows)
    memory[:] = FILL
    status, before = np.zeros(n, np.uint32), rows.copy()
    tail = (case.rows.ravel(), n, case.run)
    launch(lossy_decode.lossy_decode, rows.ctypes.data, case.pitch, form, status.ctypes.data, *tail, 0, case.codec.tiles)
    expected, good = case.decoded(rows)
    assert (rows == before).all()
    assert (status == ~good).all()
    assert (memory == expected).all(), f"{(memory != expected).sum()} values differ from the host's"
    numbers, sums, wanted = kernel_numbers(case.pitch), np.zeros((n, 2), np.uint64), np.zeros((n, 2), np.uint64)
    where = numbers.ctypes.data, wanted.ctypes.data
    launch(coded_read.read_records, rows.ctypes.data, case.pitch, n, *where, 0, case.pitch, 0, 1)
    memory[:], status[:] = FILL, 0
    digests = numbers.ctypes.data, sums.ctypes.data
    launch(lossy_decode.lossy_decode_digest, rows.ctypes.data, case.pitch, form, status.ctypes.data, *tail, *digests)
    assert (rows == before).all() and (status == ~good).all() and (memory == expected).all()
    assert (sums == wanted).all() and (sums[good] != 0).all()


def run_ranges(case: LossyCase) -> None:
    """Plane by plane, the last one first: the same pages as at once, and a header that is wrong is told where it lies and kept
    in mind. Parts, and staging with too little of each record, are told too."""
    codec, shape = case.codec, case.codec.shape
    rows = case.staging()[:, : codec.slot_bytes]
    n, memory = len(rows), aligned(case.memory.nbytes, 0).view(np.uint16).reshape(case.memory.shape)
    memory[:] = FILL
    rows[0, 40] ^= 1
    fixed = aligned(constants(codec).size, 0)
    fixed[:] = constants(codec)
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    expected, good = case.decoded(np.pad(rows, ((0, 0), (0, case.pitch - codec.slot_bytes))))
    whole = case.rows[good & (case.rows[:, 1] < 0), 0]
    sizes = [codec.key_bytes if part == "K" else codec.value_bytes for part in shape.parts_of_planes]
    each, status = codec.tiles // shape.planes, np.zeros(n, np.uint32)
    for number in range(shape.planes)[::-1]:
        begin, end = (64 + sum(sizes[:at]) for at in (number, number + 1))
        begin = begin if number else 0
        staging = aligned(n * (end - begin), 0)
        staging[:] = rows[:, begin:end].reshape(-1)
        before, tail = memory.copy(), (case.rows.ravel(), n, case.run, each * number, each * (number + 1))
        launch(lossy_decode.lossy_decode, staging.ctypes.data, end - begin, form, status.ctypes.data, *tail)
        assert (memory[number, whole] == expected[number, whole]).all()
        before[number] = memory[number]
        assert (memory == before).all(), "a plane and no other"
        assert (status == ((case.rows[:, 1] >= 0) | ((np.arange(n) == 0) & (number == 0)))).all()
        short = np.zeros(n, np.uint32)
        launch(lossy_decode.lossy_decode, staging.ctypes.data, end - begin - 16, form, short.ctypes.data, *tail)
        assert short.all() and (memory == before).all()
    assert len(whole)


@cuda.jit
def _slices(record, room, count, numbers, sums):  # type: ignore[no-untyped-def]
    shared = cuda.shared.array(coded_read.SLICE_SHARED // 8, types.uint64)
    place = lossy.uint64(shared.ctypes.data)
    for at in range(count):
        share = lossy.uint32(at), lossy.uint32(count)
        used = coded_read.used_of(record, room)
        coded_read.digest_slice(record, room, used, share[0], share[1], numbers, sums, place, cuda.threadIdx.x & 31)


def run_slices() -> None:
    """Of any number, in rooms of any length, whatever a header says: each byte once, and none beyond the room."""
    rng = np.random.default_rng(5)
    some = [(count, 16 * int(rng.integers(4, 300))) for count in (1, 2, 3, 5, 8, 13, 40)]
    for count, room in [*some, (1, 13 * 1024 + 16), (3, 24 * 1024 - 16)]:  # slots of the ring that are filled again and again
        for used in (0, 15, 33, 512, 513, room - 1, room, room + 1, 1 << 32, (1 << 32) + 64, 1 << 63):
            record, numbers, sums = aligned(room, 0), kernel_numbers(room), np.zeros(2, np.uint64)
            record[:] = rng.integers(0, 256, room)
            record[24:32] = np.array([used], np.uint64).view(np.uint8)
            bare_launch(_slices, record.ctypes.data, room, count, numbers.ctypes.data, sums.ctypes.data, grid=1)
            assert tuple(map(int, sums)) == naive_sums(record[: min(used, room)].tobytes()), (room, count, used)


def main() -> int:
    assert config.ENABLE_CUDASIM
    warnings.simplefilter("ignore", RuntimeWarning)
    warp.install(plane, lossy, lossy_encode, lossy_decode, shares, digest_staged, written, kernels_warp)
    for case in SMALL:
        run(case)
        print(f"simulated lossy: {case.name}", flush=True)
    run_slices()
    print("simulated lossy: slices of records", flush=True)
    run_cramped(LossyCase("int8", RecordShape(1, 2, 32), 1, hostile=False))
    print("simulated lossy: no room", flush=True)
    run_ranges(LossyCase("k4v4", SMALL[2].shape, 2, hostile=False))
    run_ranges(LossyCase("k6v4", RecordShape(2, 1, 128), 2, hostile=False, run=1))
    print("simulated lossy: ranges of tiles", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
