"""Gather scattered fragments of paged blocks into a contiguous staging buffer, and scatter them back.

A *piece* is a part of one fragment, small enough that one warp moves it in a few turns: a row of four 64-bit numbers,
``base address in block 0, block stride, offset in the record, bytes``. One launch moves ``n_pieces`` consecutive pieces
of ``n_blocks`` blocks; block ``b``'s record part starts at ``staging + b * pitch``. A warp takes a piece at a time
(:mod:`kvortex.kernels.shares`), or several where they are many, so the load is even however fragment sizes differ and whenever
a CTA begins, and any grid works.

The block ids are read once per CTA into shared memory, so they may lie in mapped host memory: no upload, no extra
operation on the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda
from numba.cuda import types

from kvortex.kernels.digest import columns_of, digest_move_held, settle
from kvortex.kernels.move import move
from kvortex.kernels.shares import MOST_SHARES, answer, ask_next, asker_of, ceil_div, first_share, leave

MAX_BLOCKS = 2048  # block ids of one launch: 8 KiB of shared memory

_U64 = types.uint64
_I32 = types.int32
_U32 = types.uint32
SIGNATURE: Any = types.void(_U64, types.CPointer(_U64), _I32, types.CPointer(_I32), _I32, _U64, _I32, _U64)
DIGEST_SIGNATURE: Any = types.void(*SIGNATURE.args, _U64, _U64, _U64, _U64)


def _walker(to_staging: bool, digests: bool) -> Callable[..., None]:
    """Warps share out the ``n_blocks * n_pieces`` pieces."""

    @cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
    def walk(  # type: ignore[no-untyped-def]
        staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, numbers, sums, record_bytes, piece_bytes
    ):
        ids = cuda.shared.array(MAX_BLOCKS, types.int32)
        lane = _U32(cuda.threadIdx.x & 31)
        pieces_each, total = _U32(n_pieces), _U32(_U32(n_blocks) * _U32(n_pieces))
        run = ceil_div(total, _U32(MOST_SHARES))
        shares = ceil_div(total, run)
        asker = asker_of(shares, lane)
        if only < 0:
            i = cuda.threadIdx.x
            while i < n_blocks:
                ids[i] = blocks[i]
                i += cuda.blockDim.x
        share = first_share(cuda.shared.array(1, types.uint32), counter, asker)  # behind which all warps see the ids
        if digests:
            within = _U64(0)
            columns = columns_of(numbers, within, lane)
        while share < shares:
            ahead = ask_next(counter, asker, share)
            at = _U32(share * run)
            b = _U32(at // pieces_each)
            p = _U32(at - b * pieces_each)
            end = min(_U32(at + run), total)
            while at < end:
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
                    first, second = digest_move_held(dst, src, nbytes, lane, offset, columns, numbers)
                    settle(sums + _U64(b) * record_bytes + _U64(p) * piece_bytes, first, second, lane, piece_bytes)
                else:
                    move(dst, src, nbytes, lane)
                at = _U32(at + _U32(1))
                p = _U32(p + _U32(1))
                if p == pieces_each:
                    p = _U32(0)
                    b = _U32(b + _U32(1))
            share = answer(ahead)
        leave(counter, share, shares, asker)

    return walk  # type: ignore[no-any-return]


_gather, _scatter = _walker(True, False), _walker(False, False)
_gather_digest, _scatter_digest = _walker(True, True), _walker(False, True)


def gather(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter):  # type: ignore[no-untyped-def]
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
    counter : uint64
        Of :mod:`kvortex.kernels.shares`.
    """
    _gather(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, _U64(0), _U64(0), _U64(0), _U64(0))


def scatter(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter):  # type: ignore[no-untyped-def]
    """Copies staging into pages: the reverse of :func:`gather`, with the same parameters."""
    _scatter(staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, _U64(0), _U64(0), _U64(0), _U64(0))


def gather_digest(  # type: ignore[no-untyped-def]
    staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, numbers, sums, record_bytes, piece_bytes
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
    _gather_digest(
        staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, numbers, sums, record_bytes, piece_bytes
    )


def scatter_digest(  # type: ignore[no-untyped-def]
    staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, numbers, sums, record_bytes, piece_bytes
):
    """:func:`scatter`, which also digests what it writes."""
    _scatter_digest(
        staging, pieces, n_pieces, blocks, n_blocks, pitch, only, counter, numbers, sums, record_bytes, piece_bytes
    )
