"""Records in a staging buffer that were just coded: their digests, and zeros behind those that are shorter than their room.

A record begins with a header of :mod:`kvortex.codecs.base`, which says how many bytes it uses. Its digest is that of all its
room with zeros behind it, to which zeros add nothing: so only what is used is read. What a header says is never followed out
of the room.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import add_up, digest_aligned
from kvortex.kernels.lane import load4, store4, store16
from kvortex.kernels.plane_form import DECLINED, HEADER_WORDS, STORED_AT, USED_AT
from kvortex.kernels.shares import MOST_SHARES, answer, ask_next, asker_of, ceil_div, first_share, leave

CODED_PIECE = 4096  # bytes; a warp takes one or more pieces of a record at a time
READ_SHARES = MOST_SHARES // 2  # what only reads is through in half the time
_U32, _U64 = types.uint32, types.uint64
SIGNATURE: Any = types.void(_U64, _U64, types.int32, types.int32, _U64, _U64, _U64, _U64)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def used_of(record, room):  # type: ignore[no-untyped-def]
    """Bytes that a record uses, as its header says, but no more than there are."""
    low, high = _U64(load4(record + _U64(4 * USED_AT))), _U64(load4(record + _U64(4 * USED_AT + 4)))
    used = room
    if high == _U64(0) and low < room:
        used = low
    return used


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _zero(begin, end, lane):  # type: ignore[no-untyped-def]
    """Zeros from ``begin``, a multiple of 4, to ``end``, one of 16."""
    at = begin + _U64(4) * _U64(lane)
    edge = min((begin + _U64(15)) & ~_U64(15), end)
    if at < edge:
        store4(at, _U32(0))
    at = edge + _U64(16) * _U64(lane)
    while at < end:
        store16(at, (_U32(0), _U32(0), _U32(0), _U32(0)))
        at += _U64(512)


def seal_records(staging, pitch, n_pieces, n_blocks, numbers, sums, status, counter):  # type: ignore[no-untyped-def]
    """Digests records that were just coded, and puts zeros behind them: what an earlier chunk left there leaves with nobody.

    Parameters
    ----------
    staging : uint64
        Address of the first record, a multiple of 16.
    pitch : uint64
        Room of a record, and bytes from one to the next: a multiple of 16.
    n_pieces : int32
        Pieces of ``CODED_PIECE`` bytes in that room.
    n_blocks : int32
    numbers, sums : uint64
        As of :func:`kvortex.kernels.paged.gather_digest`; ``sums`` of record ``b`` are the 16 bytes at ``sums + 16 * b``, or 0
        where nothing is digested.
    status : uint64
        Address of (n_blocks,) uint32, zeros; 1 is written for a record that was declined, of which nothing but the header is
        kept.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    lane = _U32(cuda.threadIdx.x & 31)
    run = ceil_div(_U32(_U32(n_blocks) * _U32(n_pieces)), _U32(READ_SHARES))
    runs = ceil_div(_U32(n_pieces), run)  # of a record
    shares = _U32(_U32(n_blocks) * runs)
    asker = asker_of(shares, lane)
    at = first_share(cuda.shared.array(1, types.uint32), counter, asker)
    while at < shares:
        ahead = ask_next(counter, asker, at)
        b = _U32(at // runs)
        r = _U32(at - b * runs)
        record = staging + _U64(b) * pitch
        offset, used = _U64(_U32(r * run)) * _U64(CODED_PIECE), used_of(record, pitch)
        if _U32(load4(record + _U64(4 * STORED_AT))) == _U32(DECLINED):
            used = _U64(4 * HEADER_WORDS)
            if r == _U32(0) and lane == 0:
                store4(status + _U64(b) * _U64(4), _U32(1))
        end = min(offset + _U64(run) * _U64(CODED_PIECE), pitch)
        live = max(offset, min(used, end))
        _zero(record + live, record + end, lane)  # ahead of the digest, behind which its addresses would be spilled
        if sums != _U64(0) and offset < live:
            piece = (live - offset) & _U64(0x7FFFFFFF)  # 32 bits, as the compiler sees
            first, second = digest_aligned(_U64(0), record + offset, piece, lane, offset, None, numbers)
            add_up(sums + _U64(b) * _U64(16), first, second, lane)
        at = answer(ahead)
    leave(counter, at, shares, asker)
