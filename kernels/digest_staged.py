"""Digests of what a warp reads through shared memory: more of it is in flight than there are registers for.

Rows come by twos, with their numbers, in slots of a ring. Behind the last bytes there are zeros, which add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.ahead import close_batch, copy16, copy16_of, get16, wait_for_last_but_one, wait_for_last_but_three
from kvortex.kernels.digest import ROWS_AT, both_sums, columns_of, no_sums, row16
from kvortex.kernels.lane import afresh

_U32, _U64, _I32 = types.uint32, types.uint64, types.int32
_BATCH = 1024
_SLOT = _BATCH + 48  # and numbers of three rows, since a warp's lanes may begin in two
_WAITS = {3: wait_for_last_but_one, 5: wait_for_last_but_three}


def ring_bytes(slots: int) -> int:
    """Of shared memory, a multiple of 16."""
    return slots * _SLOT


def _digester(slots: int) -> Callable[..., Any]:
    wait = _WAITS[slots]
    ring = ring_bytes(slots)

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def copy_batch(slot, src, rows, at, nbytes, lane):  # type: ignore[no-untyped-def]
        """Begins copies of the rows from byte ``at`` on, if there is one."""
        if at < nbytes:
            column = _U64(16) * _U64(lane)
            src += _U64(at) + column
            if _I32(at + _I32(_BATCH)) <= nbytes:
                copy16(slot + column, src)
                copy16(slot + column + _U64(512), src + _U64(512))
            else:
                left = _I32(nbytes - at - _I32(column))
                copy16_of(slot + column, src, _U32(min(max(left, _I32(0)), _I32(16))))
                copy16_of(slot + column + _U64(512), src + _U64(512), _U32(min(max(_I32(left - _I32(512)), _I32(0)), _I32(16))))
            if lane < _U32(3):
                copy16(slot + column + _U64(_BATCH), rows + _U64(_U32(at) >> _U32(5)) + column)
        close_batch()

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def digest(shared, src, nbytes, offset, numbers, lane):  # type: ignore[no-untyped-def]
        nbytes, at = _I32(nbytes), _I32(0)
        shared += _U64(afresh(_U32(0)))  # no registers but in here
        rows = numbers + ROWS_AT + (offset >> _U64(9)) * _U64(16)
        column = _U64(16) * _U64(lane)
        own_row = _U64(_BATCH) + (((offset & _U64(511)) + column) >> _U64(9)) * _U64(16)
        s = no_sums()
        free, this = shared, shared
        ahead = _I32(0)
        while ahead < _I32(_BATCH * (slots - 1)):
            copy_batch(free, src, rows, ahead, nbytes, lane)
            free += _U64(_SLOT)
            ahead = _I32(ahead + _I32(_BATCH))
        while at < nbytes:
            wait()
            cuda.syncwarp()  # all lanes have their parts of this batch, and have read the one before
            copy_batch(free, src, rows, _I32(at + _I32(_BATCH * (slots - 1))), nbytes, lane)
            free = this
            words, more = get16(this + column), get16(this + column + _U64(512))
            s = row16(row16(s, words, get16(this + own_row)), more, get16(this + own_row + _U64(16)))
            this += _U64(_SLOT)
            if _U32(this) == _U32(shared + _U64(ring)):  # else upper halves of addresses, which nobody needs, have registers
                this = shared
            at = _I32(at + _I32(_BATCH))
        cuda.syncwarp()  # the ring is free for others
        return both_sums(s, columns_of(numbers, offset, lane))

    return digest  # type: ignore[no-any-return]


# Both sums of a thread over ``nbytes`` from ``src`` on, which lie at ``offset`` in the record; both are multiples of 16. All
# lanes must come to it. The bytes are those of memory that nobody writes while the kernel runs, or that the warp itself wrote,
# with a ``syncwarp`` in between. ``shared`` are as many bytes of shared memory of this warp as :func:`ring_bytes` says; no
# other copies may be under way. ``numbers`` has two rows more than the record.
digest_by_three: Any = _digester(3)
digest_by_five: Any = _digester(5)
