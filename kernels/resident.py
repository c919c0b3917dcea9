"""Gather and scatter by one launch for a whole transfer, which meets the DMAs through flags.

A launch for each chunk waits each time for multiprocessors, and beside kernels that run for milliseconds most of the link
stands still. A resident kernel waits once, and then keeps the few multiprocessors that it needs to feed the link; to the
model beside it the GPU is smaller by those.

A *row* describes a chunk in eight 64-bit numbers. Warps take its pieces in turn, block after block; no two warps ever wait
for each other. When a warp is through with a chunk, each of its lanes raises the chunk's ``done`` flag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import add_up, digest_move, digest_move_fresh
from kvortex.kernels.flags import behind, nap, raise_flag
from kvortex.kernels.move import move, move_fresh
from kvortex.kernels.warp import first_dealt, next_dealt

THREADS = 512  # with 128 registers each, and 4 KiB of loads in flight in each warp
ROW_CELLS = 8
# Cells of a row: staging buffer, less the record offset of the first piece; range of ids; range of pieces; flag to wait
# for, and its value; flag to raise.
STAGING, FIRST_BLOCK, N_BLOCKS, FIRST_PIECE, N_PIECES, READY, READY_VALUE, DONE = range(ROW_CELLS)
_NAP_NS = 200

_U32, _U64 = types.uint32, types.uint64
SIGNATURE: Any = types.void(
    types.CPointer(_U64), types.int32, types.CPointer(_U64), types.CPointer(types.int32), _U64
)


DIGEST_SIGNATURE: Any = types.void(*SIGNATURE.args, _U64, _U64)


def _server(to_staging: bool, digests: bool) -> Callable[..., None]:
    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def serve(rows, n_chunks, pieces, blocks, pitch, numbers, sums):  # type: ignore[no-untyped-def]
        lane = _U32(cuda.threadIdx.x & 31)
        chunk = 0
        while chunk < n_chunks:
            row = ROW_CELLS * chunk
            while behind(rows[row + READY], rows[row + READY_VALUE]):
                nap(_NAP_NS)
            staging, first_block, first_piece = rows[row + STAGING], rows[row + FIRST_BLOCK], rows[row + FIRST_PIECE]
            n_blocks, n_pieces = _U32(rows[row + N_BLOCKS]), _U32(rows[row + N_PIECES])
            place, step = first_dealt(n_pieces)
            while place[0] < n_blocks:
                b, p = place
                at = 4 * (first_piece + _U64(p))
                record = first_block + _U64(b)
                page = pieces[at] + _U64(blocks[record]) * pieces[at + 1]
                offset, nbytes = pieces[at + 2], pieces[at + 3]
                part = staging + _U64(b) * pitch + offset
                if digests:
                    if to_staging:
                        first, second = digest_move(part, page, nbytes, lane, offset, None, numbers)
                    else:
                        first, second = digest_move_fresh(page, part, nbytes, lane, offset, None, numbers)
                    add_up(sums + record * _U64(16), first, second, lane)
                elif to_staging:
                    move(part, page, nbytes, lane)
                else:
                    move_fresh(page, part, nbytes, lane)
                place = next_dealt(place, step, n_pieces)
            raise_flag(rows[row + DONE])
            chunk += 1

    return serve  # type: ignore[no-any-return]


_gather, _scatter = _server(True, False), _server(False, False)
_gather_digest, _scatter_digest = _server(True, True), _server(False, True)


def gather_resident(rows, n_chunks, pieces, blocks, pitch):  # type: ignore[no-untyped-def]
    """Copies pages into staging buffers, chunk after chunk.

    Parameters
    ----------
    rows : pointer to uint64, (n_chunks, ROW_CELLS)
        A chunk waits until the flag at ``READY`` has reached ``READY_VALUE``: its buffer is free. Each thread of the
        grid then adds 1 to the flag at ``DONE``.
    n_chunks : int32
    pieces : pointer to uint64, (.., 4)
        As of :func:`kvortex.kernels.paged.gather`.
    blocks : pointer to int32
        Pages of all records.
    pitch : uint64
        Bytes from one record part in a buffer to the next.
    """
    _gather(rows, n_chunks, pieces, blocks, pitch, _U64(0), _U64(0))


def scatter_resident(rows, n_chunks, pieces, blocks, pitch):  # type: ignore[no-untyped-def]
    """Copies staging buffers into pages: the reverse, with the same parameters; a buffer is ready when it is filled."""
    _scatter(rows, n_chunks, pieces, blocks, pitch, _U64(0), _U64(0))


def gather_resident_digest(rows, n_chunks, pieces, blocks, pitch, numbers, sums):  # type: ignore[no-untyped-def]
    """:func:`gather_resident`, which also digests what it reads.

    Parameters
    ----------
    numbers : uint64
        Address of the table of :mod:`kvortex.kernels.digest`.
    sums : uint64
        Address of two uint64 in VRAM for each record of the transfer, which the sums of its parts are added to.
    """
    _gather_digest(rows, n_chunks, pieces, blocks, pitch, numbers, sums)


def scatter_resident_digest(rows, n_chunks, pieces, blocks, pitch, numbers, sums):  # type: ignore[no-untyped-def]
    """:func:`scatter_resident`, which also digests what it writes."""
    _scatter_digest(rows, n_chunks, pieces, blocks, pitch, numbers, sums)
