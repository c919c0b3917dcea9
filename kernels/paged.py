"""Gather scattered fragments of paged blocks into a contiguous staging buffer, and scatter them back.

A *piece* is a part of one fragment, small enough that one warp moves it in a few turns: a row of four 64-bit numbers,
``base address in block 0, block stride, offset in the record, bytes``. One launch moves ``n_pieces`` consecutive pieces
of ``n_blocks`` blocks; block ``b``'s record part starts at ``staging + b * pitch``. A warp takes a piece at a time, so
the load is even however fragment sizes differ, and any grid works.

The block ids are read once per CTA into shared memory, so they may lie in mapped host memory: no upload, no extra
operation on the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import columns_of, digest_move, settle
from kvortex.kernels.move import move

MAX_BLOCKS = 2048  # block ids of one launch: 8 KiB of shared memory

_U64 = types.uint64
_I32 = types.int32
SIGNATURE: Any = types.void(_U64, types.CPointer(_U64), _I32, types.CPointer(_I32), _I32, _U64, _I32)
DIGEST_SIGNATURE: Any = types.void(*SIGNATURE.args, _U64, _U64, _U64, _U64)


def _walker(to_staging: bool, digests: bool) -> Callable[..., None]:
    """Every warp takes every ``warps``-th of the ``n_blocks * n_pieces`` pieces."""

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def walk(  # type: ignore[no-untyped-def]
        staging, pieces, n_pieces, blocks, n_blocks, pitch, only, numbers, sums, record_bytes, piece_bytes
    ):
        ids = cuda.shared.array(MAX_BLOCKS, types.int32)
        if only < 0:
            i = cuda.threadIdx.x
            while i < n_blocks:
                ids[i] = blocks[i]
                i += cuda.blockDim.x
            cuda.syncthreads()
        lane = cuda.threadIdx.x & 31
        warp = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5
        warps = (cuda.gridDim.x * cuda.blockDim.x) >> 5
        b = warp // n_pieces
        p = warp - b * n_pieces
        skip_b = warps // n_pieces  # steps by addition: a 64-bit division a piece would cost as much as its copy
        skip_p = warps - skip_b * n_pieces
        if digests:
            within = _U64(0)
            columns = columns_of(numbers, within, lane)
        while b < n_blocks:
            block = only
            if only < 0:
                block = ids[b]
            page = pieces[4 * p] + _U64(block) * pieces[4 * p + 1]
            offset, nbytes = pieces[4 * p + 2], pieces[4 * p + 3]
            part = staging + _U64(b) * pitch + (offset - pieces[2])
            dst, src = (part, page) if to_staging else (page, part)
            if digests:
                if offset & _U64(511) != within:
                    within = offset & _U64(511)
                    columns = columns_of(numbers, within, lane)
                first, second = digest_move(dst, src, nbytes, lane, offset, columns, numbers)
                settle(sums + _U64(b) * record_bytes + _U64(p) * piece_bytes, first, second, lane, piece_bytes)
            else:
                move(dst, src, nbytes, lane)
            b += skip_b
            p += skip_p
            if p >= n_pieces:
                p -= n_pieces
                b += 1

    return walk  # type: ignore[no-any-return]


_gather, _scatter = _walker(True, False), _walker(False, False)
_gather_digest, _scatter_digest = _walker(True, True), _walker(False, True)


def gather(staging, pieces, n_pieces, blocks, n_blocks, pitch, only):  # type: ignore[no-untyped-def]
    """Copies pages into staging.

    Parameters
    ----------
    staging : uint64
        Address of the staging buffer; record part ``b`` starts at ``staging + b * pitch``.
    pieces : pointer to uint64, (n_pieces, 4)
        Base address, block stride, record offset, bytes. The first piece's offset is where the record part starts.
    n_pieces : int32
        At least 1.
    blocks : pointer to int32, (n_blocks,)
        Page of each record; device memory, or mapped host memory.
    n_blocks : int32
        At most ``MAX_BLOCKS``.
    pitch : uint64
        Bytes from one record part in staging to the next.
    only : int32
        Page of the only record, which then need not be read over the link; -1 where ``blocks`` tell.
    """
    _gather(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, _U64(0), _U64(0), _U64(0), _U64(0))


def scatter(staging, pieces, n_pieces, blocks, n_blocks, pitch, only):  # type: ignore[no-untyped-def]
    """Copies staging into pages: the reverse of :func:`gather`, with the same parameters."""
    _scatter(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, _U64(0), _U64(0), _U64(0), _U64(0))


def gather_digest(  # type: ignore[no-untyped-def]
    staging, pieces, n_pieces, blocks, n_blocks, pitch, only, numbers, sums, record_bytes, piece_bytes
):
    """:func:`gather`, which also digests what it reads.

    Parameters
    ----------
    numbers : uint64
        Address of the table of :mod:`kvortex.kernels.digest`.
    sums : uint64
        Address of two uint64 for each record, in VRAM, which the sums of its part are added to; or of two for each piece of
        each record, in VRAM or mapped host memory, which take its sums: then nothing has to be zeroed before, or read back.
    record_bytes, piece_bytes : uint64
        From the sums of one record to those of the next, and of one piece to the next; ``piece_bytes`` of 0 says that all
        pieces of a record are added up.
    """
    _gather_digest(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, numbers, sums, record_bytes, piece_bytes)


def scatter_digest(  # type: ignore[no-untyped-def]
    staging, pieces, n_pieces, blocks, n_blocks, pitch, only, numbers, sums, record_bytes, piece_bytes
):
    """:func:`scatter`, which also digests what it writes."""
    _scatter_digest(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, numbers, sums, record_bytes, piece_bytes)
