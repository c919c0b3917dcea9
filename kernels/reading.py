"""Digests of pages and buffers that no kernel moves: DMAs bring them across the link, and a kernel beside them only reads."""

from __future__ import annotations

from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import digest_read, settle
from kvortex.kernels.warp import first_dealt, next_dealt

BUFFER_PIECE = 4096  # bytes that a warp takes at a time
_U32, _U64 = types.uint32, types.uint64
_I32 = types.int32
SIGNATURE: Any = types.void(types.CPointer(_U64), _I32, types.CPointer(_I32), _I32, _I32, _U64, _U64, _U64, _U64)


def read_pages(  # type: ignore[no-untyped-def]
    pieces, n_pieces, blocks, n_blocks, only, numbers, sums, record_bytes, piece_bytes
):
    """Digests pages.

    Parameters
    ----------
    pieces, n_pieces, blocks, n_blocks, only
        As of :func:`kvortex.kernels.paged.gather`; any number of blocks.
    numbers, sums, record_bytes, piece_bytes
        As of :func:`kvortex.kernels.paged.gather_digest`.
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
        first, second = digest_read(_U64(0), page, pieces[4 * p + 3], lane, offset, None, numbers)
        settle(sums + _U64(b) * record_bytes + _U64(p) * piece_bytes, first, second, lane, piece_bytes)
        at = next_dealt(at, step, _U32(n_pieces))


def read_buffers(  # type: ignore[no-untyped-def]
    buffers, n_pieces, blocks, n_blocks, only, numbers, sums, record_bytes, piece_bytes
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
    """
    lane = _U32(cuda.threadIdx.x & 31)
    at, step = first_dealt(_U32(n_pieces))
    while at[0] < _U32(n_blocks):
        b, p = at
        offset, nbytes = _U64(p) * _U64(BUFFER_PIECE), buffers[2 * b + 1]
        if offset < nbytes:
            piece = min(nbytes - offset, _U64(BUFFER_PIECE))
            first, second = digest_read(_U64(0), buffers[2 * b] + offset, piece, lane, offset, None, numbers)
            settle(sums + _U64(b) * record_bytes + _U64(p) * piece_bytes, first, second, lane, piece_bytes)
        at = next_dealt(at, step, _U32(n_pieces))
