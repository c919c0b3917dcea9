"""What a warp has just written of a record: its digest, and zeros behind it.

A record's digest is the sum of what its bytes add, in any order (:mod:`kvortex.kernels.digest`). So who codes a part of it
digests that part too, and finds in L2 what he wrote: by plain loads, which lanes of whole 16 bytes have, and words here. All
lanes must come to each function; between the lanes' stores and :func:`digest_written` there must be a ``syncwarp``.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import digest_few, digest_word
from kvortex.kernels.digest_staged import digest_by_three, ring_bytes
from kvortex.kernels.lane import early4, store4, store16

WRITTEN_SHARED = ring_bytes(3)
_U32, _U64 = types.uint32, types.uint64


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _whole(begin, end):  # type: ignore[no-untyped-def]
    """The part of a range that lies in whole 16 bytes."""
    first = min(_U32(_U32(begin + _U32(15)) & _U32(0xFFFFFFF0)), end)
    return first, max(_U32(end & _U32(0xFFFFFFF0)), first)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _with_ends(mine, other, record, begin, end, numbers, lane):  # type: ignore[no-untyped-def]
    """Both sums with the words before and behind that part."""
    first, last = _whole(begin, end)
    at, stop = _U32(begin + _U32(4) * lane), first
    if lane >= _U32(4):
        at, stop = _U32(last + _U32(4) * _U32(lane - _U32(4))), end
    if at < stop:
        mine, other = digest_word(mine, other, _U64(early4(record + _U64(at))), _U64(at), numbers)
    return mine, other


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def digest_written(record, begin, end, numbers, shared, lane):  # type: ignore[no-untyped-def]
    """A thread's two sums of bytes ``begin`` to ``end`` of the record at ``record``: 32-bit multiples of 4. ``shared`` are
    ``WRITTEN_SHARED`` bytes of shared memory of this warp."""
    first, last = _whole(begin, end)
    mine, other = digest_by_three(shared, record + _U64(first), _U32(last - first), _U64(first), numbers, lane)
    return _with_ends(mine, other, record, begin, end, numbers, lane)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def digest_written_few(record, begin, end, numbers, lane):  # type: ignore[no-untyped-def]
    """The same by four rows at a time in registers, which is as fast where there are enough of them."""
    first, last = _whole(begin, end)
    mine, other = digest_few(_U64(0), record + _U64(first), _U64(_U32(last - first)), lane, _U64(first), None, numbers)
    return _with_ends(mine, other, record, begin, end, numbers, lane)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def zero(begin, end, lane):  # type: ignore[no-untyped-def]
    """Zeros from ``begin``, a multiple of 4, to ``end``, one of 16."""
    at = begin + _U64(4) * _U64(lane)
    edge = min((begin + _U64(15)) & ~_U64(15), end)
    if at < edge:
        store4(at, _U32(0))
    at = edge + _U64(16) * _U64(lane)
    while at < end:
        store16(at, (_U32(0), _U32(0), _U32(0), _U32(0)))
        at += _U64(512)
