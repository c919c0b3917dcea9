"""Digests of pages and buffers that no kernel moves: DMAs bring them across the link, and a kernel beside them only reads.

What a DMA is still bringing is read by a kernel that is there before it ends, and waits for a flag that is raised behind it
(:mod:`kvortex.kernels.flags`): a launch behind the DMA would begin microseconds later. Meanwhile warps have asked for all that
does not depend on it.
"""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import columns_of, digest_read_held, settle
from kvortex.kernels.flags import behind, nap
from kvortex.kernels.warp import first_dealt, next_dealt

BUFFER_PIECE = 4096  # bytes that a warp takes at a time
_U32, _U64 = types.uint32, types.uint64
_I32 = types.int32
_NAP_NS = 50
SIGNATURE: Any = types.void(
    types.CPointer(_U64), _I32, types.CPointer(_I32), _I32, _I32, _U64, _U64, _U64, _U64, _U64, _U32
)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _digest(page, nbytes, lane, offset, numbers, sums, piece_bytes, flag, value):  # type: ignore[no-untyped-def]
    """A piece, when the flag has reached ``value``. The flag to wait for before the next one: none."""
    columns = columns_of(numbers, offset, lane)
    if flag != _U64(0):
        while behind(flag, value):
            nap(_NAP_NS)
    first, second = digest_read_held(_U64(0), page, nbytes, lane, offset, columns, numbers)
    settle(sums, first, second, lane, piece_bytes)
    return _U64(0)


def read_pages(  # type: ignore[no-untyped-def]
    pieces, n_pieces, blocks, n_blocks, only, numbers, sums, record_bytes, piece_bytes, flag, value
):
    """Digests pages.

    Parameters
    ----------
    pieces, n_pieces, blocks, n_blocks, only
        As of :func:`kvortex.kernels.paged.gather`; any number of blocks.
    numbers, sums, record_bytes, piece_bytes
        As of :func:`kvortex.kernels.paged.gather_digest`.
    flag : uint64
        Address of a flag that is raised when all pages are there; 0 where they are.
    value : uint32
        Of the flag, then.
    """
    lane = _U32(cuda.threadIdx.x & 31)
    at, step = first_dealt(_U32(n_pieces))
    while at[0] < _U32(n_blocks):
        b, p = at
        block = only
        if only < 0:
            block = blocks[b]
        page = pieces[4 * p] + _U64(block) * pieces[4 * p + 1]
        offset = pieces[4 * p + 2]
        into = sums + _U64(b) * record_bytes + _U64(p) * piece_bytes
        flag = _digest(page, pieces[4 * p + 3], lane, offset, numbers, into, piece_bytes, flag, value)
        at = next_dealt(at, step, _U32(n_pieces))


def read_buffers(  # type: ignore[no-untyped-def]
    buffers, n_pieces, blocks, n_blocks, only, numbers, sums, record_bytes, piece_bytes, flag, value
):
    """Digests contiguous buffers.

    Parameters
    ----------
    buffers : pointer to uint64, (n_blocks, 2)
        Address and bytes of each.
    n_pieces : int32
        Pieces of ``BUFFER_PIECE`` bytes in the longest. Those that shorter ones have not get no sums.
    blocks, only
        Not used.
    n_blocks : int32
    numbers, sums, record_bytes, piece_bytes
        As of :func:`kvortex.kernels.paged.gather_digest`.
    flag, value
        As of :func:`read_pages`.
    """
    lane = _U32(cuda.threadIdx.x & 31)
    at, step = first_dealt(_U32(n_pieces))
    while at[0] < _U32(n_blocks):
        b, p = at
        offset, nbytes = _U64(p) * _U64(BUFFER_PIECE), buffers[2 * b + 1]
        if offset < nbytes:
            piece = min(nbytes - offset, _U64(BUFFER_PIECE))
            into = sums + _U64(b) * record_bytes + _U64(p) * piece_bytes
            flag = _digest(buffers[2 * b] + offset, piece, lane, offset, numbers, into, piece_bytes, flag, value)
        at = next_dealt(at, step, _U32(n_pieces))
