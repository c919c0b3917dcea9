"""Digests of coded records in a staging buffer that are to be decoded: of all that they use, or of a range of their bytes.

A record begins with a header of :mod:`kvortex.codecs.base`, which says how many bytes it uses. Its digest is that of all its
room with zeros behind it, to which zeros add nothing: so only what is used is read. What a header says is never followed out
of the room. It is the sum of what pieces add, in any order (:mod:`kvortex.kernels.digest`): so launches over ranges that have
each byte once make it together. What lies in staging of each record may be less than all of it: a range that lies
``shift`` bytes nearer to the record's begin than in the record.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import add_up, digest_aligned
from kvortex.kernels.digest_staged import digest_by_five, ring_bytes
from kvortex.kernels.lane import load4
from kvortex.kernels.plane_form import USED_AT
from kvortex.kernels.shares import MOST_SHARES, answer, ask_next, asker_of, ceil_div, first_share, leave

SLICE_SHARED = ring_bytes(5)
CODED_PIECE = 4096  # bytes; a warp takes one or more pieces of a record at a time
READ_SHARES = MOST_SHARES // 2  # what only reads is through in half the time
_U32, _U64 = types.uint32, types.uint64
SIGNATURE: Any = types.void(_U64, _U64, types.int32, _U64, _U64, types.int32, types.int32, types.int32, types.int32, _U64)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def used_of(record, room):  # type: ignore[no-untyped-def]
    """Bytes that a record uses, as its header says, but no more than there are."""
    low, high = _U64(load4(record + _U64(4 * USED_AT))), _U64(load4(record + _U64(4 * USED_AT + 4)))
    used = room
    if high == _U64(0) and low < room:
        used = low
    return used


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def digest_slice(record, room, used, at, count, numbers, sums, shared, lane):  # type: ignore[no-untyped-def]
    """Digests one of ``count`` equal slices of the ``used`` bytes of a record, within its room, for who decodes it in as many
    shares.

    It is not what the share decodes, whose bytes lie apart; but others work on the same record at about the same time, so one
    of both finds it in L2. What it adds goes to the 16 bytes at ``sums``; ``shared`` are ``SLICE_SHARED`` bytes of shared
    memory of this warp. All lanes must call it.
    """
    each = _U32(ceil_div(_U32(room), count) + _U32(511)) & ~_U32(511)  # rows, so that lanes stay in their columns
    begin = _U64(_U32(at * each))
    last = min(used, begin + _U64(each))
    if begin < last:
        piece = (last - begin) & _U64(0x7FFFFFFF)  # 32 bits, as the compiler sees
        mine, other = digest_by_five(shared, record + begin, piece, begin, numbers, lane)
        add_up(sums, mine, other, lane)


def read_records(  # type: ignore[no-untyped-def]
    staging, pitch, n_blocks, numbers, sums, first, end, shift, headed, counter
):
    """Digests coded records.

    Parameters
    ----------
    staging : uint64
        Address of the first record, a multiple of 16.
    pitch : uint64
        Bytes from one record to the next there: a multiple of 16.
    n_blocks : int32
    numbers, sums : uint64
        As of :func:`kvortex.kernels.paged.gather_digest`; what a record adds goes to the 16 bytes at ``sums + 16 * b``.
    first, end : int32
        Range of bytes in the record; multiples of 16.
    shift : int32
        Byte ``k`` of a record lies ``k - shift`` bytes behind its begin in staging: a multiple of 16.
    headed : int32
        Not 0 where a record begins with its header there: then no more is read than this says that it uses. Else all is.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    lane = _U32(cuda.threadIdx.x & 31)
    pieces = ceil_div(_U32(_U32(max(end, first)) - _U32(first)), _U32(CODED_PIECE))
    run = ceil_div(_U32(_U32(n_blocks) * pieces), _U32(READ_SHARES))
    runs = ceil_div(pieces, run)  # of a record
    shares = _U32(_U32(n_blocks) * runs)
    asker = asker_of(shares, lane)
    at = first_share(cuda.shared.array(1, types.uint32), counter, asker)
    while at < shares:
        ahead = ask_next(counter, asker, at)
        b = _U32(at // runs)
        r = _U32(at - b * runs)
        record = staging + _U64(b) * pitch
        offset, last = _U64(_U32(_U32(first) + r * run * _U32(CODED_PIECE))), _U64(end)
        if headed != 0:
            last = used_of(record, last)
        if offset < last:
            live = min(offset + _U64(run) * _U64(CODED_PIECE), last)
            piece = (live - offset) & _U64(0x7FFFFFFF)  # 32 bits, as the compiler sees
            source = record + offset - _U64(shift)
            mine, other = digest_aligned(_U64(0), source, piece, lane, offset, None, numbers)
            add_up(sums + _U64(b) * _U64(16), mine, other, lane)
        at = answer(ahead)
    leave(counter, at, shares, asker)
