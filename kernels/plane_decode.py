"""Coded records of the plane code into pages, fused with the scatter: the form is in :mod:`kvortex.kernels.plane_form`.

A launch decodes a range of tiles, all or some layers of them, and what lies in staging of each record is just what these
need, side by side: header and table, the fixed parts of the range, and tails from one common offset on. Of all tiles that
is the record as it is.

What a record says is checked before anything is led by it: header, lengths, and every tile's entry against its planes and
against what lies there. So damaged bytes become a failure of their record and are never followed out of it.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels import plane
from kvortex.kernels.lane import load1, load2, load4, load16, store4
from kvortex.kernels.plane import (
    ACROSS,
    ALL,
    CODED,
    GROUPS,
    HEADER,
    HEADER_WORDS,
    N_PLANES,
    STORED_AT,
    TABLE_WORDS,
    USED_AT,
    VERBATIM,
    WARPS,
    place,
    tail_bytes,
    tails,
    uniform,
    verbatim_at,
)
from kvortex.kernels.plane_form import FIXED_BYTES, RAW_ROWS, RAW_TAIL, RAW_TILE, ROWS, SIGN_AT, VALUES

uint16, uint32, uint64, int32 = plane.uint16, plane.uint32, plane.uint64, plane.int32
SIGNATURE: Any = types.void(
    uint64, uint64, types.CPointer(uint64), uint64, types.CPointer(types.int32), int32, int32, int32, int32, int32
)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def is_ours(record, header, lane):  # type: ignore[no-untyped-def]
    """Whether a header is of this codec, its tables and this shape; the same in every lane."""
    same = True
    if lane < uint32(HEADER_WORDS):
        offset = uint64(4) * uint64(lane)
        varies = lane == uint32(STORED_AT) or lane == uint32(USED_AT)
        same = varies or uint32(load4(record + offset)) == uint32(load4(header + offset))
    return uint32(cuda.ballot_sync(ALL, same)) == uint32(0xFFFFFFFF)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _second_tier(tail, entry, lane, second):  # type: ignore[no-untyped-def]
    """Puts the second tier into shared memory: how far below the base, or 16 and the exponent. False: it contradicts itself."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    groups = uint32(((entry & uint32(0xFFFF)) + uint32(31)) >> uint32(5))
    n_escapes = uint32(entry >> uint32(16))
    escapes = uint32(0)
    group = uint32(0)
    while group < groups:
        words = tail + uint64(12) * uint64(group)
        p = uint32(load4(words))
        q = uint32(load4(words + uint64(4)))
        r = uint32(load4(words + uint64(8)))
        code = uint32(
            (p >> lane) & uint32(1) | ((q >> lane) & uint32(1)) << uint32(1) | ((r >> lane) & uint32(1)) << uint32(2)
        )
        mask = uint32(p & q & r)
        below = uint32(code + uint32(3))
        if code == uint32(0):
            below = uint32(0)
        if code == uint32(7):
            k = uint32(escapes + uint32(cuda.popc(uint32(mask & lower))))
            if k < n_escapes:
                below = uint32(uint32(16) + uint32(load1(tail + uint64(12) * uint64(groups) + uint64(k))))
        second[uint32(uint32(32) * group + lane)] = uint16(below)
        escapes = uint32(escapes + uint32(cuda.popc(mask)))
        group = uint32(group + uint32(1))
    return escapes == n_escapes


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _exponent(code, base, late):  # type: ignore[no-untyped-def]
    exponent = uint32(base - uint32(1) - code)
    if code == uint32(3):
        exponent = uint32(base - late)
        if late >= uint32(16):
            exponent = uint32(late - uint32(16))
    return uint32(exponent & uint32(255))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _row(planes, signs, low_base, high_base, lane, n, second):  # type: ignore[no-untyped-def]
    """Two values of this lane from a row's four plane words, and how many codes of the second tier are used up now."""
    lower = uint32((uint32(1) << lane) - uint32(1))
    p, q, r, s = uint32(planes[0]), uint32(planes[1]), uint32(planes[2]), uint32(planes[3])
    low = uint32((p >> lane) & uint32(1) | ((q >> lane) & uint32(1)) << uint32(1))
    high = uint32((r >> lane) & uint32(1) | ((s >> lane) & uint32(1)) << uint32(1))
    mask = uint32(p & q)
    late = uint32(0)
    if low == uint32(3):
        late = uint32(second[uint32(n + uint32(cuda.popc(uint32(mask & lower))))])
    low = _exponent(low, low_base, late)
    n = uint32(n + uint32(cuda.popc(mask)))
    mask = uint32(r & s)
    late = uint32(0)
    if high == uint32(3):
        late = uint32(second[uint32(n + uint32(cuda.popc(uint32(mask & lower))))])
    high = _exponent(high, high_base, late)
    n = uint32(n + uint32(cuda.popc(mask)))
    first = (signs & uint32(0x80)) << uint32(8) | low << uint32(7) | signs & uint32(0x7F)
    other = signs & uint32(0x8000) | high << uint32(7) | (signs >> uint32(8)) & uint32(0x7F)
    return uint32(first | other << uint32(16)), n


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tile(fixed, target, step, pair, lane, second):  # type: ignore[no-untyped-def]
    """Writes a tile's rows, two at a time; gives how many codes of the second tier it used."""
    low_base = uint32(pair & uint32(255))
    high_base = uint32(pair >> uint32(8))
    odd = uint32(lane & uint32(1))
    n = uint32(0)
    row = uint32(0)
    while row < uint32(ROWS):
        planes = load16(fixed + uint64(16) * uint64(row))
        more = load16(fixed + uint64(16) * uint64(row) + uint64(16))
        line = uint64(64) * uint64(row + odd) + uint64(4) * uint64(lane >> uint32(1))
        word = uint32(load4(fixed + uint64(SIGN_AT) + line))
        # An even lane has read the first row for its pair, an odd one the second: each gives what the other needs.
        given = uint32(word >> uint32(16)) if odd == uint32(0) else uint32(word & uint32(0xFFFF))
        got = uint32(cuda.shfl_xor_sync(ALL, int32(given), 1))
        mine = uint32(word & uint32(0xFFFF)) if odd == uint32(0) else got
        theirs = got if odd == uint32(0) else uint32(word >> uint32(16))
        values, n = _row(planes, mine, low_base, high_base, lane, n, second)
        store4(target, values)
        values, n = _row(more, theirs, low_base, high_base, lane, n, second)
        store4(target + step, values)
        target += step + step
        row = uint32(row + uint32(2))
    return n


def plane_decode(  # type: ignore[no-untyped-def]
    staging, pitch, codec, status, blocks, n_blocks, run, first, end, tails_from
):
    """Decodes staging into pages.

    Parameters
    ----------
    staging, pitch, codec, blocks, n_blocks, run
        As of :func:`kvortex.kernels.plane_encode.plane_encode`. Nobody writes to staging meanwhile.
    status : uint64
        Address of (n_blocks,) uint32, zeros before the first launch that the records are in; 1 is written for what is no record
        of this codec, and nothing for others, so that launches over several ranges of tiles share it. Its page may have been
        overwritten in part.
    first, end : int32
        Range of tiles.
    tails_from : int32
        Offset in all records of the first tail byte in staging. With all tiles and ``fixed_bytes`` of the codec what lies there
        is a record as it is, which may also be one that is kept verbatim.
    """
    all_second = cuda.shared.array((WARPS, VALUES), types.uint16)
    second = all_second[cuda.threadIdx.x >> 5]
    lane = uint32(cuda.threadIdx.x & 31)
    warp = uniform(uint32((cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5))
    warps = uint32((cuda.gridDim.x * cuda.blockDim.x) >> 5)
    tiles = uint32(uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))
    count = uint32(uint32(end) - uint32(first))
    runs = uint32((count + uint32(run) - uint32(1)) // uint32(run))
    head_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * uint32(codec[TABLE_WORDS]))
    own_bytes = uint32(head_bytes + uint32(FIXED_BYTES) * count)  # in front of the tails in staging
    room = uint32(uint32(pitch) - own_bytes)
    at = warp
    while at < uint32(uint32(n_blocks) * runs):
        b = uint32(at // runs)
        tile = uint32(uint32(first) + (at - b * runs) * uint32(run))
        last = min(uint32(tile + uint32(run)), uint32(end))
        record = staging + uint64(b) * pitch
        good = is_ours(record, codec[HEADER], lane)
        stored = uniform(uint32(load4(record + uint64(4 * STORED_AT))))
        used = uniform(uint32(load4(record + uint64(4 * USED_AT))))
        tail_at = uint32(0)
        if stored == uint32(CODED):
            good = good and uint64(own_bytes) <= pitch
            if good:
                before, total = tails(record + uint64(4 * HEADER_WORDS), tile, tiles, lane)
                fixed_bytes = uint32(head_bytes + uint32(FIXED_BYTES) * tiles)
                good = uint32(fixed_bytes + total) == used
                tail_at = uint32(uint32(fixed_bytes + before) - uint32(tails_from))  # before the first one it is beyond all
        else:
            verbatim_bytes = uint32(uint32(4 * HEADER_WORDS) + uint32(2 * VALUES) * tiles)
            good = good and stored == uint32(VERBATIM) and used == verbatim_bytes and uint64(used) <= pitch and count == tiles
        if not good:
            tile = last
        fixed = record + uint64(head_bytes) + uint64(FIXED_BYTES) * uint64(uint32(tile - uint32(first)))
        while tile < last:
            target, step, base = place(codec, tile, blocks[b], lane)
            if stored == uint32(VERBATIM):
                source = record + verbatim_at(codec, tile) + uint64(4) * uint64(lane)
                row = uint32(0)
                while row < uint32(ROWS):
                    store4(target + uint64(row) * step, load4(source + uint64(row) * step))
                    row = uint32(row + uint32(1))
            else:
                entry = uniform(uint32(load4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(tile))))
                size = tail_bytes(entry)
                tail = record + uint64(own_bytes) + uint64(tail_at)
                if size > uint32(RAW_TAIL) or tail_at > room or size > uint32(room - tail_at):
                    good = False  # this tile's tail is none, or lies elsewhere
                elif entry == uint32(RAW_TILE):
                    row = uint32(0)
                    while row < uint32(ROWS):
                        begin = fixed + uint64(128) * uint64(row)
                        if row >= uint32(RAW_ROWS):
                            begin = tail + uint64(128) * uint64(row - uint32(RAW_ROWS))
                        store4(target + uint64(row) * step, load4(begin + uint64(4) * uint64(lane)))
                        row = uint32(row + uint32(1))
                else:
                    good = _second_tier(tail, entry, lane, second) and good
                    cuda.syncwarp()
                    n = _tile(fixed, target, step, uint32(load2(base)), lane, second)
                    good = good and n == uint32(entry & uint32(0xFFFF))
                    cuda.syncwarp()
                tail_at = uint32(tail_at + size)
            fixed += uint64(FIXED_BYTES)
            tile = uint32(tile + uint32(1))
        if not good and lane == uint32(0):
            store4(status + uint64(4) * uint64(b), uint32(1))
        at = uint32(at + warps)
