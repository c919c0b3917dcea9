"""Pages into coded records of the plane code, fused with the gather, in one launch: the form is in
:mod:`kvortex.kernels.plane_form`.

Fixed parts have their places from the beginning. Tails lie one behind another, so a warp keeps those of its tiles in shared
memory until it knows how long all before are (:mod:`kvortex.kernels.sizes`). Of tiles behind those that it can keep it finds
how long their tails are, and makes them when it knows where they belong: no warp waits before it has told others. Whether a
record fits is known when all its tails are made: who ends last with it, by a counter, writes its header, and makes good what
others wrote of a record that is kept as it is, or does not fit. He does so alone, which takes a millisecond or two of 2 MiB
that are kept as they are; slots are too short for that, and an engine never sees it.

Bytes are the same in every launch, whoever comes first.
"""

from __future__ import annotations

from numba import cuda
from numba.cuda import types

from kvortex.kernels import plane
from kvortex.kernels.ahead import ALIGNED, get4, shared_at
from kvortex.kernels.digest import add_up, digest_word
from kvortex.kernels.divide import quotient
from kvortex.kernels.flags import join, tell
from kvortex.kernels.lane import early_cached2, store4, store8
from kvortex.kernels.plane import (
    ACROSS,
    CODED,
    DECLINED,
    HEADER,
    HEADER_WORDS,
    VERBATIM,
    fixed_bytes,
    head_bytes,
    place,
    tiles_of,
    write_header,
)
from kvortex.kernels.plane_form import ENCODE_WARPS, FIXED_BYTES, MOST_TAIL, RAW_TAIL, RAW_TILE, VALUES
from kvortex.kernels.plane_row import shifted_bases
from kvortex.kernels.plane_tile import (
    SHARED_BYTES,
    beside,
    count_escapes,
    eight_rows,
    eight_signs,
    eight_words,
    keep_raw,
    make_tail,
)
from kvortex.kernels.shares import answer, ask_next, ceil_div, first_share, leave
from kvortex.kernels.sizes import bytes_before, publish
from kvortex.kernels.warp import uniform
from kvortex.kernels.written import digest_written, zero

SIGNATURE = plane.ENCODE_SIGNATURE
uint32, uint64, int32 = plane.uint32, plane.uint64, plane.int32
# Bytes of tails that a warp keeps. 16 tiles of real KV have 1,640, and none of 354 such shares had more than these, with the
# room that a tail might take before it is made; a tile's are at most 1,408 before it is kept raw.
KEPT_TAILS = 2560
# Fixed parts are digested behind so many tiles, as long as L2 has them: 16 tiles of all warps are more than an H200's.
DIGESTED_TILES = 8
_WARP = SHARED_BYTES + KEPT_TAILS
_SHARED = ENCODE_WARPS * _WARP // 8
_verbatim = plane.verbatim(to_record=True)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _runs(codec, run):  # type: ignore[no-untyped-def]
    """Shares of a record, and the tiles of each but the last."""
    each = min(uint32(run), uint32(32))
    return ceil_div(tiles_of(codec), each), each


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _share(codec, at, run):  # type: ignore[no-untyped-def]
    """Of a share its record, which one of that it is, its first tile, and how many it has."""
    runs, each = _runs(codec, run)
    b = uint32(quotient(at, runs))
    r = uint32(at - uint32(b * runs))
    tile = uint32(r * each)
    return b, r, tile, min(uint32(tiles_of(codec) - tile), each)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _done_at(codec, counts, b):  # type: ignore[no-untyped-def]
    """Where it is counted who has done his share of a record; behind it are the shares' cells."""
    return counts + uint64(4) * uint64(b) * uint64(uint32(tiles_of(codec) + uint32(1)))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _put_tails(record, pitch, at, kept, nbytes, lane):  # type: ignore[no-untyped-def]
    """Tails from shared memory into a record, as far as there is room: else it will be declined."""
    if uint64(uint32(at + nbytes)) <= pitch:
        k = uint32(uint32(4) * lane)
        while k < nbytes:
            store4(record + uint64(uint32(at + k)), get4(kept + uint64(k)))
            k = uint32(k + uint32(128))


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _range(codec, tile, n, fixed, tail_at, total, k):  # type: ignore[no-untyped-def]
    """Begin and end of what a share has written: fixed parts, but for those of the first ``fixed`` tiles; entries, unless these
    are all; and tails."""
    if k == uint32(0):
        begin = uint32(head_bytes(codec) + uint32(FIXED_BYTES) * uint32(tile + fixed))
        end = uint32(begin + uint32(FIXED_BYTES) * uint32(n - fixed))
    elif k == uint32(1):
        begin = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * tile)
        end = begin
        if fixed < n:
            end = uint32(begin + uint32(4) * n)
    else:
        begin, end = tail_at, uint32(tail_at + total)
    return begin, end


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _digested(record, pitch, begin, end, count, entry, entry_at, numbers, sums, shared, lane):  # type: ignore[no-untyped-def]
    """Adds what bytes of a record that the warp has written add to its digest, and the first ``count`` lanes' entries."""
    if uint64(end) <= pitch:  # else it is declined, and not all of that was written
        mine, other = digest_written(record, begin, end, numbers, shared, lane)
        if lane < count:
            mine, other = digest_word(mine, other, uint64(entry), uint64(uint32(entry_at + uint32(4) * lane)), numbers)
        add_up(sums, mine, other, lane)


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _tiles(codec, at, run, counts, block, tile, count, record, pitch, numbers, sums, shared, lane):  # type: ignore[no-untyped-def]
    """Writes up to 32 tiles of a coded record, one at least, with their entries in the table: where their tails begin, how long
    these are, and of how many tiles the fixed parts are digested already."""
    across = uint32(codec[ACROSS])
    kept = shared + uint64(SHARED_BYTES)
    fits = uint64(fixed_bytes(codec)) <= pitch
    entries, total, tail_at = uint32(0), uint32(0), uint32(0)  # no tail lies at 0: nobody has said where they begin
    digested = uint32(0)  # tiles
    i, not_kept = uint32(0), uint32(0)  # the first tile of which no tail is kept, and 64; above, how long those before are
    while i < count:
        source, wide, base = place(codec, uint32(tile + i), block, lane)
        step = uint32(wide)  # a register less
        column = uint32(uint32(128) * uint32(tile + i) - quotient(uint32(tile + i), across) * step)
        fixed = record + uint64(uint32(head_bytes(codec) + uint32(FIXED_BYTES) * uint32(tile + i)))
        next_pair = uint32(early_cached2(base))
        next_words = eight_words(source, step)
        stop = min(uint32(i + uint32(DIGESTED_TILES)), count)
        while i < stop:
            pair, words = next_pair, next_words
            more = eight_words(source + uint64(8) * uint64(step), step)
            bases = shifted_bases(pair)
            eight_signs(words, fixed, 0, fits, lane)
            n = eight_rows(words, bases, shared, fixed, 0, fits, uint32(0), lane)
            eight_signs(more, fixed, 1, fits, lane)
            i = uint32(i + uint32(1))
            if i < stop:
                source, base, column = beside(codec, uint32(tile + i), block, lane, source, step, base, column)
                next_pair = uint32(early_cached2(base))
                next_words = eight_words(source, step)
            n = eight_rows(more, bases, shared, fixed, 1, fits, n, lane)
            cuda.syncwarp()
            groups = uint32(uint32(12) * uint32(uint32(n + uint32(31)) >> uint32(5)))
            most = uint32(groups + uint32(uint32(n + uint32(3)) & uint32(0xFFFFFFFC)))
            if uint32(tail_at | not_kept) == uint32(0) and uint32(total + most) > uint32(KEPT_TAILS):
                not_kept = uint32(total << uint32(8) | uint32(i + uint32(63)))
            tail = kept
            if not_kept == uint32(0):
                if tail_at == uint32(0):
                    tail += uint64(total)
                escapes = uint32(make_tail(tail, n, lane, shared))
            else:
                escapes = uint32(count_escapes(n, lane, shared))
            size = uint32(groups + uint32(uint32(escapes + uint32(3)) & uint32(0xFFFFFFFC)))
            entry = uint32(n | escapes << uint32(16))
            cuda.syncwarp()  # the tail is there; and what is there of the fixed part, others write over if the tile stays raw
            if size > uint32(MOST_TAIL):
                size, entry = uint32(RAW_TAIL), uint32(RAW_TILE)
                if not_kept == uint32(0):
                    keep_raw(codec, uint32(tile + i - uint32(1)), block, fixed, fits, tail, lane)
                    cuda.syncwarp()
            if lane == uint32(i - uint32(1)):
                entries = entry
            if tail_at != uint32(0):
                _put_tails(record, pitch, uint32(tail_at + total), kept, size, lane)
            total = uint32(total + size)
            cuda.syncwarp()
            fixed += uint64(FIXED_BYTES)
        if tail_at == uint32(0):
            b, share, _, _ = _share(codec, at, run)  # again: no register has kept it
            cells = _done_at(codec, counts, b) + uint64(4)
            if i == count:
                publish(cells, share, total, lane)
                if lane < count and fits:
                    store4(record + uint64(4 * HEADER_WORDS) + uint64(4) * uint64(uint32(tile + lane)), entries)
            cuda.syncwarp()
            if not_kept == uint32(0) and sums != uint64(0):
                begin, end = _range(codec, tile, i, digested, uint32(0), uint32(0), uint32(0))
                entry_at = uint32(uint32(4 * HEADER_WORDS) + uint32(4) * tile)
                n = count if i == count else uint32(0)
                sums_at = sums + uint64(16) * uint64(b)
                _digested(record, pitch, begin, end, n, entries, entry_at, numbers, sums_at, shared, lane)
                digested = i
            if i == count:
                tail_at = uint32(fixed_bytes(codec) + bytes_before(cells, share, lane))
                if not_kept != uint32(0):  # once more, from there on
                    i, total, not_kept = uint32(not_kept & uint32(63)), uint32(not_kept >> uint32(8)), uint32(0)
                _put_tails(record, pitch, tail_at, kept, total, lane)
                cuda.syncwarp()
    return tail_at, total, digested


@cuda.jit(device=True, inline="always")  # type: ignore[untyped-decorator]
def _finished(codec, record, pitch, done, runs, block, sums, status, lane):  # type: ignore[no-untyped-def]
    """For a warp that has done its share of a record: how many bytes of its head there are to be digested, by who is the last
    one; 0 by all others. The record is whole then, whichever way it is kept, and its counter and cells are zeros again."""
    cuda.syncwarp()
    before = uint32(0)
    if lane == uint32(0):
        before = uint32(join(done))
    head = uint32(0)
    if uniform(before) == uint32(runs - uint32(1)):
        cuda.syncwarp()  # what lane 0 has seen of others all lanes have
        tiles, head = tiles_of(codec), uint32(4 * HEADER_WORDS)
        used = uint32(fixed_bytes(codec) + bytes_before(done + uint64(4), runs, lane))
        verbatim_bytes = uint32(head + uint32(2 * VALUES) * tiles)
        stored = uint32(CODED)
        if used >= verbatim_bytes:
            stored, used = uint32(VERBATIM), verbatim_bytes
        if uint64(used) > pitch:
            stored = uint32(DECLINED)
        live = used
        if stored != uint32(CODED) and lane < uint32(2) and sums != uint64(0):  # others have digested what they wrote
            store8(sums + uint64(8) * uint64(lane), uint64(0))
        if stored == uint32(VERBATIM):
            _verbatim(record, codec, block, uint32(0), tiles, lane)
            head = used
        elif stored == uint32(DECLINED):
            live = head
            if lane == uint32(0):
                store4(status, uint32(1))
        else:
            zero(record + uint64(uint32(head + uint32(4) * tiles)), record + uint64(head_bytes(codec)), lane)
        zero(record + uint64(live), record + pitch, lane)
        write_header(record, codec[HEADER], stored, used, lane)
        k = lane
        while k <= runs:
            tell(done + uint64(4) * uint64(k), uint32(0))
            k = uint32(k + uint32(32))
        cuda.syncwarp()
    return head


def plane_encode(  # type: ignore[no-untyped-def]
    staging, pitch, codec, counts, blocks, n_blocks, run, numbers, sums, status, counter
):
    """Codes pages into staging, with zeros behind each record, and digests the records.

    CTAs have ``ENCODE_WARPS`` warps at most, for which there is shared memory.

    Parameters
    ----------
    staging : uint64
        Address of the staging buffer, a multiple of 16; record ``b`` starts at ``staging + b * pitch``.
    pitch : uint64
        Room of a record, and bytes from one to the next: a multiple of 16. Of a record that needs more there are the header,
        which says how much, and zeros.
    codec : pointer to uint64
        See :mod:`kvortex.kernels.plane`.
    counts : uint64
        Address of (n_blocks, 1 + tiles) uint32 in VRAM, zeros; zeros again when the kernel has ended.
    blocks : pointer to int32, (n_blocks,)
        Page of each record; device memory, or mapped host memory.
    n_blocks : int32
    run : int32
        Tiles that a warp takes at a time, at least 1.
    numbers, sums : uint64
        As of :func:`kvortex.kernels.paged.gather_digest`; ``sums`` of record ``b`` are the 16 bytes at ``sums + 16 * b``,
        zeros, or 0 where nothing is digested.
    status : uint64
        Address of (n_blocks,) uint32, zeros; 1 is written for a record that was declined.
    counter : uint64
        Of :mod:`kvortex.kernels.shares`. No share is dealt out: see :mod:`kvortex.kernels.sizes`.
    """
    all_shared = cuda.shared.array(_SHARED, types.uint64, ALIGNED)
    shared = uint64(shared_at(all_shared.ctypes.data)) + uint64(_WARP) * uint64(cuda.threadIdx.x >> 5)
    lane = uint32(cuda.threadIdx.x & 31)
    shares = uint32(uint32(n_blocks) * _runs(codec, run)[0])
    at = first_share(all_shared, counter, lane)
    while at < shares:
        b, _, tile, n = _share(codec, at, run)
        record = staging + uint64(b) * pitch
        tail_at, total, fixed = _tiles(codec, at, run, counts, blocks[b], tile, n, record, pitch, numbers, sums, shared, lane)
        b, _, tile, n = _share(codec, at, run)  # again, as in there
        record = staging + uint64(b) * pitch
        sums_at = sums
        if sums != uint64(0):
            sums_at = sums + uint64(16) * uint64(b)
        k, none = uint32(0), uint32(0)
        while k < uint32(4):
            begin, end = uint32(0), uint32(0)
            if k < uint32(3):
                begin, end = _range(codec, tile, n, fixed, tail_at, total, k)
            else:
                done, runs = _done_at(codec, counts, b), _runs(codec, run)[0]
                end = _finished(codec, record, pitch, done, runs, blocks[b], sums_at, status + uint64(4) * uint64(b), lane)
            if sums != uint64(0) and begin < end:
                _digested(record, pitch, begin, end, none, none, none, numbers, sums_at, shared, lane)
            k = uint32(k + uint32(1))
        at = answer(ask_next(counter, lane, at))  # not before: who holds a share and does another keeps all behind it waiting
    leave(counter, at, shares, lane)
