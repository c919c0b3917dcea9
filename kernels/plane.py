"""What the plane kernels share: who works on what, headers, and the sums over a record's table by which decoders find tails.

A launch works on ``n_blocks`` records, the coded one of block ``b`` at ``staging + b * pitch``; both are multiples of 16. A
warp takes ``run`` neighbouring tiles at a time (:mod:`kvortex.kernels.shares`). Any grid works; a CTA has at most ``WARPS``
warps, or ``ENCODE_WARPS``. All other numbers come from ``codec``, uint64 in VRAM: see the cells below. Rows of planes lie at
multiples of 4.

Indices are unsigned, because a signed one costs Numba a comparison and 64-bit arithmetic each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.divide import quotient
from kvortex.kernels.lane import all_here, early16, load4, store4
from kvortex.kernels.plane_form import (
    ACROSS,
    BASES,
    CODED,
    DECLINED,
    FIXED_BYTES,
    GROUPS,
    HEADER,
    HEADER_WORDS,
    MOST_TAIL,
    N_PLANES,
    PLANES,
    RAW_TAIL,
    RAW_TILE,
    ROWS,
    STORED_AT,
    TABLE_WORDS,
    USED_AT,
    VALUES,
    VERBATIM,
    WARPS,
)
from kvortex.kernels.warp import ALL, uniform

__all__ = [
    "ACROSS", "BASES", "CODED", "DECLINED", "GROUPS", "HEADER", "HEADER_WORDS", "N_PLANES", "PLANES", "STORED_AT",
    "TABLE_WORDS", "USED_AT", "VERBATIM", "WARPS",
]  # fmt: skip

uint8, uint16, uint32, uint64, int32 = types.uint8, types.uint16, types.uint32, types.uint64, types.int32
SIGNATURE: Any = types.void(
    uint64, uint64, types.CPointer(uint64), uint64, types.CPointer(types.int32), types.int32, types.int32
)
DIGEST_SIGNATURE: Any = types.void(*SIGNATURE.args, uint64, uint64, uint64)  # with digests' numbers and sums, and a counter
ENCODE_SIGNATURE: Any = types.void(*SIGNATURE.args, uint64, uint64, uint64, uint64)  # with status of records besides


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def tiles_of(codec):  # type: ignore[no-untyped-def]
    """Tiles of a record."""
    return uint32(uint32(codec[N_PLANES]) * uint32(codec[GROUPS]) * uint32(codec[ACROSS]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def head_bytes(codec):  # type: ignore[no-untyped-def]
    """Bytes of a record before the first fixed part: header and table."""
    return uint32(uint32(4 * HEADER_WORDS) + uint32(4) * uint32(codec[TABLE_WORDS]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def fixed_bytes(codec):  # type: ignore[no-untyped-def]
    """Bytes of a record before the first tail."""
    return uint32(head_bytes(codec) + uint32(FIXED_BYTES) * tiles_of(codec))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def tail_bytes(entry):  # type: ignore[no-untyped-def]
    """Bytes of a tile's tail by its entry in the table; more than any where no tile has that entry."""
    count = uint32(entry & uint32(0xFFFF))
    escapes = uint32(entry >> uint32(16))
    size = uint32(uint32(12) * ((count + uint32(31)) >> uint32(5)) + ((escapes + uint32(3)) & uint32(0xFFFFFFFC)))
    if count > uint32(VALUES) or escapes > count or size > uint32(MOST_TAIL):
        size = uint32(1 << 20)
    if entry == uint32(RAW_TILE):
        size = uint32(RAW_TAIL)
    return size


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _four_before(words, i, first):  # type: ignore[no-untyped-def]
    """Entries of tiles ``i`` to ``i + 3``; 0 for those that are not before tile ``first``."""
    none = uint32(0)
    a = uint32(words[0]) if i < first else none
    b = uint32(words[1]) if uint32(i + uint32(1)) < first else none
    c = uint32(words[2]) if uint32(i + uint32(2)) < first else none
    d = uint32(words[3]) if uint32(i + uint32(3)) < first else none
    return a, b, c, d


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _padded(entries):  # type: ignore[no-untyped-def]
    """Sums over four tiles: of values in whole 32s below, of escapes in whole fours above; of one that is kept raw, 0."""
    more, whole = uint32(3 << 16 | 31), uint32(0xFFFCFFE0)
    a, b = uint32(uint32(entries[0] + more) & whole), uint32(uint32(entries[1] + more) & whole)
    c, d = uint32(uint32(entries[2] + more) & whole), uint32(uint32(entries[3] + more) & whole)
    return uint32(a + b + c + d)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _raw(entries):  # type: ignore[no-untyped-def]
    """How many of four tiles are kept raw."""
    a = uint32(1) if entries[0] == uint32(RAW_TILE) else uint32(0)
    b = uint32(1) if entries[1] == uint32(RAW_TILE) else uint32(0)
    c = uint32(1) if entries[2] == uint32(RAW_TILE) else uint32(0)
    d = uint32(1) if entries[3] == uint32(RAW_TILE) else uint32(0)
    return uint32(a + b + c + d)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _largest(entries):  # type: ignore[no-untyped-def]
    return max(max(entries[0], entries[1]), max(entries[2], entries[3]))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def tails_before(table, first, lane):  # type: ignore[no-untyped-def]
    """Bytes of all tails before tile ``first``, by the entries at ``table``, a multiple of 16, the same in every lane. Whether
    these entries are any that a tile has, is for those to say who decode them: the sum of others is some multiple of 4."""
    before, at = uint32(0), uint32(0)
    most = uint32(uint32(first - uint32(1)) & uint32(0xFFFFFFFC))
    while at < first:  # four loads in flight
        i = uint32(at + uint32(4) * lane)
        j, k, m = uint32(i + uint32(128)), uint32(i + uint32(256)), uint32(i + uint32(384))
        a, b = early16(table + uint64(4) * uint64(min(i, most))), early16(table + uint64(4) * uint64(min(j, most)))
        c, d = early16(table + uint64(4) * uint64(min(k, most))), early16(table + uint64(4) * uint64(min(m, most)))
        all_here()
        a, b = _four_before(a, i, first), _four_before(b, j, first)
        c, d = _four_before(c, k, first), _four_before(d, m, first)
        # Of 16 tiles: no sum of what tiles have reaches into the other one.
        both = uint32(_padded(a) + _padded(b) + _padded(c) + _padded(d))
        before = uint32(before + uint32(uint32(3) * uint32(both & uint32(0xFFFF)) >> uint32(3)) + uint32(both >> uint32(16)))
        if max(max(_largest(a), _largest(b)), max(_largest(c), _largest(d))) == uint32(RAW_TILE):
            before = uint32(before + uint32(RAW_TAIL) * uint32(_raw(a) + _raw(b) + _raw(c) + _raw(d)))
        at = uint32(at + uint32(512))
    return uint32(warp_sum(before) & uint32(0xFFFFFFFC))  # of entries that no tile has: copies begin at words


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def warp_sum(value):  # type: ignore[no-untyped-def]
    """Of a 32-bit number of each lane."""
    value = uint32(value + uint32(cuda.shfl_xor_sync(ALL, int32(value), 16)))
    value = uint32(value + uint32(cuda.shfl_xor_sync(ALL, int32(value), 8)))
    value = uint32(value + uint32(cuda.shfl_xor_sync(ALL, int32(value), 4)))
    value = uint32(value + uint32(cuda.shfl_xor_sync(ALL, int32(value), 2)))
    return uniform(uint32(value + uint32(cuda.shfl_xor_sync(ALL, int32(value), 1))))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def place(codec, tile, block, lane):  # type: ignore[no-untyped-def]
    """Where a tile's first row lies in the pages for this lane, bytes from row to row, and the lane's two bases as 16 bits."""
    across = uint32(codec[ACROSS])
    groups = uint32(codec[GROUPS])
    high = uint32(quotient(tile, across))
    column = uint32(tile - high * across)
    plane = uint32(quotient(high, groups))
    group = uint32(high - plane * groups)
    step = uint64(across) * uint64(128)
    page = codec[uint32(PLANES) + uint32(2) * plane] + uint64(block) * codec[uint32(PLANES + 1) + uint32(2) * plane]
    row = page + uint64(group) * uint64(16) * step + uint64(column) * uint64(128) + uint64(4) * uint64(lane)
    base = codec[BASES] + (uint64(plane) * uint64(across) + uint64(column)) * uint64(64) + uint64(2) * uint64(lane)
    return row, step, base


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def write_header(record, header, stored, used, lane):  # type: ignore[no-untyped-def]
    """A codec's header with these two fields."""
    if lane < uint32(HEADER_WORDS):
        word = uint32(load4(header + uint64(4) * uint64(lane)))
        if lane == uint32(STORED_AT):
            word = stored
        if lane == uint32(USED_AT):
            word = used
        store4(record + uint64(4) * uint64(lane), word)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _verbatim_at(codec, tile):  # type: ignore[no-untyped-def]
    """Where the first row of a tile lies in a record that is kept as it is, counted from the record's begin."""
    across = uint32(codec[ACROSS])
    high = uint32(quotient(tile, across))
    column = uint32(tile - high * across)
    return uint64(64) + uint64(high) * uint64(2048) * uint64(across) + uint64(column) * uint64(128)


def verbatim(to_record: bool) -> Callable[..., None]:
    """A function that copies tiles of a record that is kept as it is, into it or out of it."""

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def copy(record, codec, block, tile, last, lane):  # type: ignore[no-untyped-def]
        while tile < last:
            page, step, _ = place(codec, tile, block, lane)
            kept = record + _verbatim_at(codec, tile) + uint64(4) * uint64(lane)
            target, source = (kept, page) if to_record else (page, kept)
            row = uint32(0)
            while row < uint32(ROWS):
                store4(target + uint64(row) * step, load4(source + uint64(row) * step))
                row = uint32(row + uint32(1))
            tile = uint32(tile + uint32(1))

    return copy  # type: ignore[no-any-return]
