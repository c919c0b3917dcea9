"""Runs the plane kernels in Numba's simulator, beside the host's twin. A process of its own, as simulate.py is.

Started by test_plane_kernels.py as ``NUMBA_ENABLE_CUDASIM=1 python -m tests.kernels.simulate_plane``; prints one line a case.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
import warnings

import numpy as np
from numba import cuda
from numba.cuda.core import config

import conftest  # noqa: F401  (makes kvortex.kernels importable)
from kvortex.codecs import RecordShape
from kvortex.codecs.on_device import cells, constants
from kvortex.digests.host import add_lengths
from kvortex.digests.keys import kernel_numbers
from kvortex.kernels import (
    coded_read,
    digest_staged,
    marked,
    plane,
    plane_decode,
    plane_encode,
    plane_row,
    plane_tile,
    shares,
    sizes,
    written,
)
from kvortex.kernels import warp as kernels_warp
from tests.kernels import warp
from tests.kernels.plane_cases import CASES, GUARD, PlaneCase, change_code, ranged, tail_size
from tests.naive_digest import digest
from tests.naive_digest import sums as naive_sums


def aligned(nbytes: int, fill: int) -> np.ndarray:
    made = np.full(nbytes + 64, fill, np.uint8)
    return made[-made.ctypes.data % 16 :][:nbytes]


def bare_launch(kernel: object, *arguments: object, grid: int = 2, threads: int = 32) -> None:
    warp.before_launch()
    cuda.jit(kernel)[grid, threads](*arguments)  # type: ignore[index]


def launch(kernel: object, *arguments: object, grid: int = 2, threads: int = 32) -> None:
    """With a counter of shares, which kernels leave at 0."""
    counter = np.zeros(1, np.uint32)
    bare_launch(kernel, *arguments, counter.ctypes.data, grid=grid, threads=threads)
    assert not counter.any(), "the next launch would find shares taken"


def run(case: PlaneCase) -> None:
    n, codec = len(case.blocks), case.codec
    memory = case.memory.copy()
    fixed = constants(codec)
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    staging = aligned(n * case.pitch + 2 * GUARD, 0xA5)
    counts = np.zeros((n, 1 + case.tiles), np.uint32)
    start = staging.ctypes.data + GUARD
    tail = (case.blocks, n, case.run)
    rows, numbers, (_, sizes) = staging[GUARD:-GUARD].reshape(n, case.pitch), kernel_numbers(case.pitch), case.coded()
    usual = plane_encode.KEPT_TAILS
    ways = (True, case.run, 64, usual), (False, 33, 32, 300), (False, 33, 64, 1024), (True, 1, 64, 99)
    for digests, how_many, threads, kept in ways:
        plane_encode.KEPT_TAILS = kept  # of some tiles tails are only counted, and made when it is known where they belong
        staging[:] = 0xA5
        sums, status = np.zeros((n, 2), np.uint64), np.zeros(n, np.uint32)
        where = numbers.ctypes.data, sums.ctypes.data if digests else 0, status.ctypes.data
        how = start, case.pitch, form, counts.ctypes.data, case.blocks, n, how_many, *where
        launch(plane_encode.plane_encode, *how, threads=threads)
        assert (memory == case.memory).all() and not counts.any()
        assert (staging[:GUARD] == 0xA5).all() and (staging[-GUARD:] == 0xA5).all()
        assert not case.wrong(rows), f"{case.wrong(rows)} bytes differ from the host's"
        assert (status == (sizes < 0)).all()
        for row, size, found in zip(rows, sizes, sums, strict=True):
            assert not row[64 if size < 0 else size :].any(), "zeros behind a record"
            assert tuple(map(int, found)) == (naive_sums(row.tobytes()) if digests else (0, 0))
    plane_encode.KEPT_TAILS = usual
    memory[:] = 0x5A5A
    status = np.zeros(n, np.uint32)
    launch(plane_decode.plane_decode, start, case.pitch, form, status.ctypes.data, *tail, 0, case.tiles, codec.fixed_bytes)
    assert (status == (sizes < 0)).all()
    whole = case.blocks[sizes > 0]
    assert (memory[:, whole] == case.memory[:, whole]).all()
    assert (memory[:, case.blocks[sizes < 0]] == 0x5A5A).all(), "what was declined touches no page"
    run_digested(case, start, form, tail, memory, status)


def run_digested(case: PlaneCase, start: int, form: np.ndarray, tail: tuple, memory: np.ndarray, status: np.ndarray) -> None:
    """The same pages and failures, and the same digests as of who only reads."""
    n, numbers = len(case.blocks), kernel_numbers(case.pitch)
    sums, wanted, again = np.zeros((n, 2), np.uint64), np.zeros((n, 2), np.uint64), np.zeros(n, np.uint32)
    decoded = memory.copy()
    memory[:] = 0x5A5A
    where = numbers.ctypes.data, wanted.ctypes.data
    launch(coded_read.read_records, start, case.pitch, n, *where, 0, case.pitch, 0, 1)
    how = start, case.pitch, form, again.ctypes.data, *tail, numbers.ctypes.data, sums.ctypes.data
    for grid, threads in ((2, 32), (1, 64)):
        sums[:], again[:], memory[:] = 0, 0, 0x5A5A
        launch(plane_decode.plane_decode_digest, *how, grid=grid, threads=threads)
        assert (again == status).all() and (memory == decoded).all()
        assert (sums == wanted).all() and (sums[status == 0] != 0).all()


def run_shares() -> None:
    """Records of so many pieces that a warp takes several at a time, and each record's last share has fewer; what lies behind a
    record does not count, and a length that leads nowhere is that of the room."""
    sizes, usual = np.array([10 * 4096 + 512, 5 * 4096 + 1004, 64, 8 * 4096, 1 << 40]), coded_read.READ_SHARES
    coded_read.READ_SHARES = 8
    n, pitch = len(sizes), 10 * 4096 + 512
    staging = aligned(n * pitch, 0)
    rows = staging.reshape(n, pitch)
    rows[:] = np.random.default_rng(4).integers(0, 256, rows.shape)
    rows[:, 24:32].view(np.uint64)[:, 0] = sizes
    numbers, sums = kernel_numbers(pitch), np.zeros((n, 2), np.uint64)
    launch(coded_read.read_records, rows.ctypes.data, pitch, n, numbers.ctypes.data, sums.ctypes.data, 0, pitch, 0, 1)
    for row, size, found in zip(rows, sizes, sums, strict=True):
        assert tuple(map(int, found)) == naive_sums(row[: min(size, pitch)].tobytes())
    run_strips(rows)
    coded_read.READ_SHARES = usual


def run_strips(rows: np.ndarray) -> None:
    """Digests of ranges, of which each lies in a staging buffer of its own, come to those of records."""
    n, pitch = rows.shape
    numbers, sums = kernel_numbers(pitch), np.zeros((n, 2), np.uint64)
    for first, end in itertools.pairwise([0, 5 * 4096 + 528, pitch]):
        less = first // 2 // 16 * 16  # some of what lies before a range lies there too
        staging = aligned(n * (pitch - less), 0)
        staging[:] = rows[:, less:].reshape(-1)
        span = first, end, less, 0
        how = staging.ctypes.data, pitch - less, n, numbers.ctypes.data, sums.ctypes.data
        launch(coded_read.read_records, *how, *span)
    for row, found in zip(rows, add_lengths(sums, np.full(n, pitch)), strict=True):
        assert found.tobytes() == digest(row.tobytes())


def run_damaged(case: PlaneCase) -> None:
    """The same record, each time damaged in another place: all are told, and nothing outside the pages changes."""
    codec = case.codec
    pages = {"header": 9, "stored": 8, "used": 24, "entry": 64, "first tier": 64 + 16, "second tier": codec.fixed_bytes}
    raw = np.repeat(case.records()[case.blocks == 0], len(pages), 0)  # of the usual kind
    staging = aligned(len(pages) * case.pitch, 0)
    rows = staging.reshape(len(pages), case.pitch)
    assert (codec.encode_into(raw, rows) > 0).all()
    for row, (what, at) in zip(rows, pages.items(), strict=True):
        if what == "second tier":
            words = row[at : at + 4].view(np.uint32)
            assert words != 0x77777777
            words |= np.uint32(0x77777777)  # codes become escapes, more than the entry has
        elif what == "first tier":
            change_code(row, at)
        else:
            row[at] ^= 1
    memory = np.full((case.memory.shape[0], len(pages) + 2, *case.memory.shape[2:]), 0x5A5A, np.uint16)
    fixed, blocks = constants(codec), np.arange(1, len(pages) + 1, dtype=np.int32)
    form = cells(codec, case.fragments(memory.ctypes.data, len(pages) + 2), fixed.ctypes.data)
    status = np.zeros(len(pages), np.uint32)
    tail = blocks, len(pages), 2, 0, case.tiles, codec.fixed_bytes
    launch(plane_decode.plane_decode, staging.ctypes.data, case.pitch, form, status.ctypes.data, *tail)
    assert status.tolist() == [1] * len(pages), dict(zip(pages, status.tolist(), strict=True))
    assert not codec.decode_into(rows, np.empty_like(raw)).any(), "the host sees what the kernels see"
    assert (memory[:, [0, -1]] == 0x5A5A).all()


def decoded(case: PlaneCase, start: int, pitch: int) -> tuple[np.ndarray, int]:
    """What pages are behind a launch that decodes one record to the first, by shares of a tile, and its status."""
    codec, memory, status = case.codec, np.full_like(case.memory, 0x5A5A), np.zeros(1, np.uint32)
    fixed, blocks = constants(codec), np.zeros(1, np.int32)
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    how = start, pitch, form, status.ctypes.data, blocks, 1, 1, 0, case.tiles, codec.fixed_bytes
    launch(plane_decode.plane_decode, *how)
    return memory, int(status[0])


def run_roomy(case: PlaneCase) -> None:
    """An entry that no tile has, in a record whose length agrees with it, where much lies behind the record."""
    codec, pitch = case.codec, 2 << 20
    row = aligned(pitch, 0)
    assert (codec.encode_into(case.records()[case.blocks == 0][:1], row[None]) > 0).all()
    entry, used = row[64:68].view(np.uint32), row[24:32].view(np.uint64)
    count, escapes = int(entry[0]) & 0xFFFF, int(entry[0]) >> 16
    entry[0], used[0] = 0xFFFF, int(used[0]) - 12 * -(-count // 32) - 4 * -(-escapes // 4) + (1 << 20)
    memory, status = decoded(case, row.ctypes.data, pitch)
    tile = np.ix_([0], [0], np.arange(16), np.arange(64))
    assert status == 1 and (memory[tile] == 0x5A5A).all()


def run_carried(case: PlaneCase) -> None:
    """Entries whose values are so many that their sum reaches into that of escapes: copies that the next shares begin, of
    tails that lie nowhere, still begin at words."""
    codec, row = case.codec, aligned(case.pitch, 0)
    assert (codec.encode_into(case.records()[case.blocks == 0][:1], row[None]) > 0).all()
    row[64:72].view(np.uint32)[:] = 0xFFC0, 0x0400
    memory, status = decoded(case, row.ctypes.data, case.pitch)
    assert case.tiles > 2 and status == 1 and (memory[:, 1:] == 0x5A5A).all()


def run_cornered(case: PlaneCase) -> None:
    """A record that says it is coded, in a room without its table: nothing behind that is read, which nobody may."""
    codec, page = case.codec, mmap.PAGESIZE
    whole = np.zeros((1, codec.worst_bytes), np.uint8)
    assert (codec.encode_into(case.records()[:1], whole) > 0).all()
    own = mmap.mmap(-1, 2 * page)
    address, libc = ctypes.addressof(ctypes.c_char.from_buffer(own)), ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + page), ctypes.c_size_t(page), 0) == 0
    start = address + page - case.pitch
    ctypes.memmove(start, whole.ctypes.data, case.pitch)
    memory, status = decoded(case, start, case.pitch)
    assert status == 1 and (memory == 0x5A5A).all()


def run_many() -> None:
    """Shares of more tiles than are digested at a time, some raw, with tails that are kept and tails that are not."""
    case = PlaneCase("many tiles", RecordShape(1, 1, 64, tokens=16 * 18, parts="L"), 1)
    raw = [16 * at + token for at in (9, 17) for token in range(16)]
    case.memory[0, 0, raw] = np.random.default_rng(1).integers(0, 1 << 16, (len(raw), 64))
    codec, memory, fixed = case.codec, case.memory.copy(), constants(case.codec)
    form, numbers = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data), kernel_numbers(case.pitch)
    usual = plane_encode.KEPT_TAILS
    row, counts = aligned(case.pitch, 0xA5), np.zeros((1, 1 + case.tiles), np.uint32)
    sums, status = np.zeros((1, 2), np.uint64), np.zeros(1, np.uint32)
    where = numbers.ctypes.data, sums.ctypes.data
    for kept in (usual, 1200):
        plane_encode.KEPT_TAILS, sums[:] = kept, 0
        head = row.ctypes.data, case.pitch, form, counts.ctypes.data, case.blocks, 1, 16, *where, status.ctypes.data
        launch(plane_encode.plane_encode, *head, grid=1, threads=64)
        assert case.tiles == 18 and not case.wrong(row[None]) and not status.any() and not counts.any()
        assert tuple(map(int, sums[0])) == naive_sums(row.tobytes())
    plane_encode.KEPT_TAILS = usual
    sums[:], memory[:] = 0, 0x5A5A
    how = row.ctypes.data, case.pitch, form, status.ctypes.data, case.blocks, 1, 4, *where
    launch(plane_decode.plane_decode_digest, *how, grid=1, threads=64)
    assert (memory == case.memory).all() and not status.any() and tuple(map(int, sums[0])) == naive_sums(row.tobytes())


def _sums_before(table, firsts, count, out):  # type: ignore[no-untyped-def]
    lane = plane.uint32(cuda.threadIdx.x & 31)
    for k in range(count):
        before = plane.tails_before(plane.uint64(table), plane.uint32(firsts[k]), lane)
        if lane == 0:
            out[k] = before


def run_sums() -> None:
    """Of tails before any tile of a long table, a tenth of whose tiles are raw."""
    rng, tiles = np.random.default_rng(2), 1100
    values = rng.integers(0, 1025, tiles)
    entries = (values | (values * rng.random(tiles)).astype(np.int64) << 16).astype(np.uint32)
    entries[rng.random(tiles) < 0.1] = 0xFFFFFFFF
    table, firsts = aligned(4 * tiles, 0), np.array([0, 1, 6, 130, 259, 511, 512, 517, 1097], np.uint32)
    table.view(np.uint32)[:] = entries
    sizes = [tail_size(each) for each in entries.tolist()]
    out = np.zeros(len(firsts), np.uint32)
    bare_launch(_sums_before, table.ctypes.data, firsts, len(firsts), out, grid=1)
    assert out.tolist() == [sum(sizes[:first]) for first in firsts.tolist()]


def run_ranges(case: PlaneCase, edges: list[int]) -> None:
    """Tiles range by range, the last range first: pages and digests become those of whole records, and what one launch says
    of a record the next ones let stand. One is damaged in the last range alone, and those that are no coded ones are told."""
    codec, (rows, sizes) = case.codec, case.coded()
    rows[np.arange(case.pitch) >= np.where(sizes < 0, 64, sizes)[:, None]] = 0
    bad = rows[:, 8:12].view(np.uint32)[:, 0] != 0
    heads = rows[:, :64].copy()
    rows[bad, 64:] = 0  # as no slot has them, and nothing is to be led by
    rows[bad, 24] = 64
    hurt = int(np.flatnonzero(~bad)[0])
    ranges = ranged(codec, rows, edges)
    again, right = rows.copy(), rows.copy()
    at = 64 + 4 * codec.form[2] + 1280 * edges[-2]  # the first tile of the last range
    change_code(again[hurt], at)
    n, memory = len(rows), np.full_like(case.memory, 0x5A5A)
    fixed, expected, numbers = constants(codec), memory.copy(), kernel_numbers(case.pitch)
    form = cells(codec, case.fragments(memory.ctypes.data), fixed.ctypes.data)
    status, sums = np.zeros(n, np.uint32), np.zeros((n, 2), np.uint64)
    for mine, damaged in zip(ranges[::-1], ranged(codec, again, edges)[::-1], strict=True):
        pitch, where = mine.rows.shape[1], damaged.tails_from
        staging = aligned(mine.rows.size, 0)
        how = staging.ctypes.data, pitch, form, status.ctypes.data, case.blocks, n, case.run, mine.first, mine.end
        staging[:] = mine.rows.reshape(-1)
        for span in mine.spans:
            launch(coded_read.read_records, staging.ctypes.data, pitch, n, numbers.ctypes.data, sums.ctypes.data, *span)
        staging[:] = damaged.rows.reshape(-1)
        launch(plane_decode.plane_decode, *how, where, grid=2, threads=32)
        for tile in range(mine.first, mine.end):
            high, column = divmod(tile, int(codec.form[1]))
            plane, group = divmod(high, int(codec.form[0]))
            there = np.ix_([plane], case.blocks[~bad], 16 * group + np.arange(16), 64 * column + np.arange(64))
            expected[there] = case.memory[there]
        whole = np.delete(np.arange(n), np.append(np.flatnonzero(bad), hurt))
        assert (memory[:, case.blocks[whole]] == expected[:, case.blocks[whole]]).all(), "a range of tiles and no others"
        assert (memory[:, case.blocks[bad]] == 0x5A5A).all() and status[hurt] == 1 and (status[whole] == 0).all()
        assert (status[bad] == 1).all()
        status[bad], short = 0, np.zeros(n, np.uint32)
        for less, off in ((16, 0), (0, 16), (0, 1 << 30)):  # less lies there than tails take, or something else
            cut = aligned(n * (pitch - less), 0)
            cut[:] = damaged.rows[:, : pitch - less].reshape(-1)
            less_how = cut.ctypes.data, pitch - less, form, short.ctypes.data, *how[4:], where + off
            launch(plane_decode.plane_decode, *less_how)
            assert short.any(), (less, off)
            short[:] = 0
        memory[:, case.blocks[whole]] = expected[:, case.blocks[whole]]
        roomy = aligned(n * case.pitch, 0)
        roomy.reshape(n, -1)[:, :64] = heads  # of records that are kept verbatim, of which no range is to be had
        launch(plane_decode.plane_decode, roomy.ctypes.data, case.pitch, form, short.ctypes.data, *how[4:], where)
        assert short.all() and (memory[:, case.blocks[bad]] == 0x5A5A).all()
        short[:] = 0
    for row, found in zip(right[~bad], add_lengths(sums, np.full(n, case.pitch))[~bad], strict=True):
        assert found.tobytes() == digest(row.tobytes())


def main() -> int:
    assert config.ENABLE_CUDASIM
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # sums are modulo 2**64
    coders = plane, plane_encode, plane_tile, plane_decode, plane_row, marked
    warp.install(*coders, shares, sizes, digest_staged, written, kernels_warp)
    for case in CASES:
        run(case)
        print(f"simulated plane: {case.name}", flush=True)
    run_shares()
    run_many()
    print("simulated plane: shares of several pieces", flush=True)
    run_damaged(CASES[0])
    run_roomy(CASES[0])
    run_carried(CASES[2])
    run_cornered(CASES[5])
    run_sums()
    print("simulated plane: damaged records", flush=True)
    run_ranges(CASES[0], [0, 1, 2])
    run_ranges(CASES[2], [0, 1, 3, 4])
    print("simulated plane: ranges of tiles", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
